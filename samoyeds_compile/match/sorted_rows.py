"""Experts over rows that come sorted by expert, with counts from elsewhere: torchtitan's ``GroupedExperts``.

Dispatch and combination stay as they are, and with them every exchange between ranks, in its place; only the grouped
products between them are rewritten. Source: ``torchtitan/models/common/moe.py: GroupedExperts.forward``.

    offs = cumsum(counts, 0, dtype=int32)
    h = act(GMM(x, w1.transpose(-2, -1), offs), GMM(x, w3.transpose(-2, -1), offs))
    out = GMM(h, w2.transpose(-2, -1), offs).type_as(x)
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from samoyeds_codegen import expr
from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.activation import ActivationReader, NoExpression
from samoyeds_compile.match.experts import (
    collect_members,
    only_user,
    require_one_dtype,
    require_weight,
    same_size,
    strip_cast,
    strip_transpose,
)
from samoyeds_compile.match.grouped import counted_elsewhere
from samoyeds_compile.match.region import Candidate, Decline, Family, Linear, MoERegion, Unlike, require


class SortedRows(Family):
    """Grouped matrix products over rows that something else has sorted and counted."""

    name = "sorted_rows"
    summary = "grouped matrix products over rows sorted and counted elsewhere (torchtitan, expert parallelism)"

    def candidates(self, graph: ValueGraph) -> list[Candidate]:
        """Grouped products that share their offsets, unless these count ids that are sorted here: `Grouped`."""
        by_offsets: dict[Value, list[Value]] = defaultdict(list)
        for product in graph.with_op("_grouped_mm"):
            offsets = product.arg("offs")
            if isinstance(offsets, Value) and counted_elsewhere(product):
                by_offsets[offsets].append(product)
        return [Candidate(p[0], partial(_match, graph, offs, p)) for offs, p in by_offsets.items()]


def _match(graph: ValueGraph, offsets: Value, products: list[Value]) -> MoERegion:
    if len(products) not in (2, 3):
        raise Unlike(f"{len(products)} grouped products share these offsets, not two or three", products[0])
    *first, last = products
    x = _common_rows(first)
    *gates, up = linears = [_linear(product) for product in first]
    down = _linear(last)
    for linear in linears:
        require(linear.num_experts == down.num_experts, "projections differ in their number of experts", last)
        require(linear.transposed == down.transposed, "one projection is transposed and another is not", last)
        require_one_dtype(linear, down)
    require(same_size(offsets.shape[0], down.num_experts), "the offsets do not count the experts", offsets)
    require(down.out_features == up.in_features, "the experts do not keep the width of the rows", last)
    text, layout = _activation(linears, last.input, down.in_features)
    output = only_user(last, "to") or only_user(last, "type_as") or last
    region = MoERegion(
        family=SortedRows.name, graph=graph, x=x, expert_ids=None, expert_weights=None, top_k=1, offsets=offsets,
        gate=gates[0] if gates else None, up=up, down=down, activation=text, gate_up_layout=layout, output=output,
    )  # fmt: skip
    collect_members(region)
    return region


def _common_rows(products: list[Value]) -> Value:
    """The rows [R, H] that all first projections read."""
    x = strip_cast(products[0].input)
    require(all(strip_cast(p.input) is x for p in products), "the first projections read different rows", products[0])
    require(len(x.shape) == 2, "the rows are not [R, H]", x)
    return x


def _linear(product: Value) -> Linear:
    require(product.arg("bias") is None and product.arg("out_dtype") is None, "the grouped product has a bias", product)
    weight, flipped = strip_transpose(product.arg("mat2"))
    require_weight(weight)
    require(weight.dtype == product.dtype, "weight and product differ in dtype", product)
    assert product.dtype is not None
    return Linear((weight,), None, not flipped, product, product.dtype)


def _activation(linears: list[Linear], rows: Value, width: int) -> tuple[str, str]:
    """What stands between the projections, as an expression, and where gate and up lie."""
    *_, up = linears
    require(up.out_features in (width, 2 * width), "the first projection is neither I nor 2I wide", up.result)
    sources = [linear.result for linear in linears]
    try:
        if len(sources) == 1:
            return ActivationReader(sources[0], strip_cast(rows), up.out_features, width).read()
        require(linears[0].out_features == width, "gate and up differ in width", sources[0])
        return _TwoSources(sources, strip_cast(rows), width).read()
    except NoExpression as error:
        raise Decline("what stands between the projections is not known to be elementwise", rows) from error


class _TwoSources(ActivationReader):
    """Reads an activation over the rows of two projections."""

    def __init__(self, sources: list[Value], result: Value, width: int) -> None:
        super().__init__(sources[1], result, width, width)
        self.sources = sources

    def _leaf(self, value: Value) -> Any:
        if value not in self.sources:
            return None
        self.layouts.add("separate")
        return expr.GATED_NAMES[self.sources.index(value)]
