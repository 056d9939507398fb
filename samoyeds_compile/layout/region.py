"""A region as the assignment sees it: ops with declared layouts, the edges between them, and sizes for the costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy

from samoyeds_compile.layout import declare
from samoyeds_compile.layout.machine import Constants

Numbers = tuple[float, ...]
"""Values of `declare.ARGUMENTS`."""


@dataclass(frozen=True)
class Sizes:
    """The block whose layouts are chosen.

    Attributes:
        tokens, hidden, width, experts, top_k: T, H, I, E, K.
        gated: whether there is a gate beside up.
        bias: whether any projection has a bias.
        size, tile_size: bytes of an element of the rows that come in, and of one in a tile.
    """

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    gated: bool = True
    bias: bool = False
    size: int = 4
    tile_size: int = 4

    def at(self, tokens: int) -> Sizes:
        """The same block with so many tokens."""
        return replace(self, tokens=tokens)

    def of_one_expert(self, tokens: int) -> Sizes:
        """One of its experts with so many tokens."""
        return replace(self, tokens=tokens, experts=1, top_k=1)

    def numbers(self, constants: Constants) -> Numbers:
        """What the expressions of costs are evaluated with."""
        rows, tiles = constants.kernel.rows, constants.kernel.tiles
        return (
            self.tokens, self.hidden, self.width, self.experts, self.top_k, 2 if self.gated else 1, self.size,
            self.tile_size, constants.move, constants.turn, tiles.lanes, rows.read, rows.step, rows.mac, tiles.read,
            tiles.step, tiles.mac, 0, 0, 0, 0,
        )  # fmt: skip


@dataclass(frozen=True)
class Edge:
    """Rows from one op to the next: positions in `Region.ops`, None outside of it; ``wide``: I features, else H."""

    name: str
    source: int | None
    target: int | None
    wide: bool = False


@dataclass(frozen=True)
class Region:
    """Ops by name, the edges between them, and pairs of ops that one kernel computes, in one order of rows.

    ``target`` is what computes it, one of `declare.TARGETS`.
    """

    ops: tuple[str, ...]
    edges: tuple[Edge, ...]
    together: tuple[tuple[int, int], ...] = ()
    target: str = declare.CPU


def experts_region(sizes: Sizes, target: str = declare.CPU) -> Region:
    """The region of a block of experts: from tokens, through slots, to tokens."""
    bias = ("bias",) if sizes.bias else ()
    ops = ("gather", "expert_up", *bias, "activation", "expert_down", *bias, "scale", "combine")
    first, last = ops.index("expert_up"), ops.index("expert_down")
    edges = [Edge("x", None, 0)]
    for position in range(len(ops) - 1):
        wide = first <= position < last
        edges.append(Edge(f"{ops[position]} -> {ops[position + 1]}", position, position + 1, wide))
    return Region(ops, (*edges, Edge("out", len(ops) - 1, None)), ((first, last),), target)


def evaluate(expression: sympy.Expr, numbers: Numbers) -> int:
    """Whole picoseconds."""
    return round(evaluate_float(expression, numbers))


def evaluate_float(expression: sympy.Expr, numbers: Numbers) -> float:
    """An expression in `declare.ARGUMENTS`."""
    return _function(expression)(*numbers)


@functools.cache
def _function(expression: sympy.Expr) -> Callable[..., float]:
    return sympy.lambdify(declare.ARGUMENTS, expression, "math")  # type: ignore[no-any-return]
