"""Experts over rows that are dispatched already, [E, C, H] -> [E, C, H]: capacity, expert choice, soft slots.

Dispatch and combination stay as they are, whatever they drop; only the experts between them are rewritten.

    z = einsum("ech,ehi->eci", d, w1) | bmm(d, w1) [+ b];  y = bmm(act(z), w2) [+ b2]
    y = cat([expert(d_e) for expert, d_e in zip(experts, d.chunk(E))])
"""

from __future__ import annotations

from functools import partial

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.experts import collect_members
from samoyeds_compile.match.notation.batched import Batched
from samoyeds_compile.match.notation.family import NotationFamily
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Products
from samoyeds_compile.match.region import Candidate, Decline, MoERegion, Unlike


class Dispatched(NotationFamily):
    """Experts over rows of their own."""

    name = "dispatched"
    summary = "experts over rows already dispatched, [E, C, H] (capacity, expert choice, soft slots)"

    def candidates(self, graph: ValueGraph) -> list[Candidate]:
        """Products of rows [E, C, *], and joined results of single experts."""
        notation = Notation(graph)
        products = Products(notation, self.grouped)
        ends = [v for v in graph.values if _is_end(v, products)]
        return [Candidate(v, partial(_match, graph, notation, products, v)) for v in ends]


def _is_end(value: Value, products: Products) -> bool:
    joined = value.op in ("cat", "stack") and isinstance(value.input, tuple)
    batched = value.op in ("bmm", "einsum", "baddbmm", "matmul")
    if not (joined or batched) or len(value.shape) not in (3, 4):
        return False
    return all(isinstance(v, Value) and v.is_tensor for v in value.input) if joined else True


def _match(graph: ValueGraph, notation: Notation, products: Products, end: Value) -> MoERegion:
    batched = Batched(graph, notation, products, _with_bias(end))
    try:
        region = batched.region()
    except Decline as decline:
        raise decline if batched.looks_like_a_block else Unlike(decline.reason, decline.at) from decline
    collect_members(region)
    return region


def _with_bias(end: Value) -> Value:
    """The sum of a product and a bias, if that is all that happens to it."""
    total = end.users[0] if len(end.users) == 1 and end.users[0].op == "add" else end
    return total if total.shape == end.shape else end
