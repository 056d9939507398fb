"""The cheapest layouts of a region: each edge is two variables, what is written and what is read. One cut chooses all.

Where the two differ stands a conversion, whose cost is paid; else the edge is free.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from samoyeds_compile.layout.algebra import Place
from samoyeds_compile.layout.cut import FORBIDDEN, LABELS, Table, cost, minimise, table
from samoyeds_compile.layout.declare import DECLARATIONS, H, I, steps
from samoyeds_compile.layout.region import Edge, Numbers, Region, evaluate

Pins = Mapping[str, Place]
"""Layouts in which edges must be written, by the edge's name."""
_TOGETHER = table({(a, b): 0 for a, b in itertools.product(LABELS, LABELS) if (a == 2) == (b == 2)})
"""Of what two ops read that one kernel computes: tiles both, or neither."""


@dataclass(frozen=True)
class EdgeLayout:
    """An edge with its layout.

    Attributes:
        edge: what it connects.
        written, read: as its source writes it and its target reads it; a conversion stands where they differ.
        picoseconds: what the conversion and the op that writes it cost.
        runner_up: the layout that would be second best, with all others chosen anew; None if no other is possible.
        margin: picoseconds that the whole region would take longer with that one.
    """

    edge: Edge
    written: Place
    read: Place
    picoseconds: int
    runner_up: Place | None = None
    margin: int = 0

    @property
    def converts(self) -> bool:
        """Whether a conversion stands on it."""
        return self.written != self.read


@dataclass(frozen=True)
class Assignment:
    """Layouts of all edges of a region, in its order, and what the region costs in picoseconds."""

    edges: tuple[EdgeLayout, ...]
    picoseconds: int

    def __getitem__(self, name: str) -> EdgeLayout:
        return next(layout for layout in self.edges if layout.edge.name == name)


class Problem:
    """The variables and tables of a region: variable 2 i is what edge i is written as, 2 i + 1 what it is read as."""

    def __init__(self, region: Region, numbers: Numbers) -> None:
        self.region, self._numbers = region, numbers
        self.unary = [[0, 0, 0] for _ in range(2 * len(region.edges))]
        self.pairs: list[tuple[int, int, Table]] = []
        self._ops = {}
        for number, edge in enumerate(region.edges):
            self.pairs.append((2 * number, 2 * number + 1, self._conversion(edge)))
            if edge.source is None or edge.target is None:  # outside of the region rows lie as the model has them
                self.pin(edge.name, Place.TOKENS, written=edge.source is None)
        for op in range(len(region.ops)):
            read, written = self._port(op, "target"), self._port(op, "source")
            self._ops[written] = (read, written, self._op(region.ops[op]))
        self.pairs += self._ops.values()
        for first, second in region.together:
            self.pairs.append((self._port(first, "target"), self._port(second, "target"), _TOGETHER))

    def pin(self, edge: str, place: Place, written: bool = True) -> None:
        """Have an edge written, or read, in one layout only."""
        variable = 2 * [other.name for other in self.region.edges].index(edge) + (not written)
        for label in LABELS:
            self.unary[variable][label] += FORBIDDEN * (label != place)

    def solve(self) -> Assignment:
        """The cheapest layouts; whether they are possible at all shows in the cost."""
        return self._assignment(minimise(self.unary, self.pairs)[0])

    def cost_with(self, edge: str, place: Place) -> int:
        """Of the cheapest layouts in which an edge is written in this one."""
        before = [list(costs) for costs in self.unary]
        self.pin(edge, place)
        costs, self.unary = minimise(self.unary, self.pairs)[1], before
        return costs

    def _assignment(self, labels: Sequence[int]) -> Assignment:
        """These labels, with what each edge costs."""
        found = []
        for number, edge in enumerate(self.region.edges):
            written, read = labels[2 * number], labels[2 * number + 1]
            own = self.pairs[number][2][written][read]
            if 2 * number in self._ops:
                before, _, costs = self._ops[2 * number]
                own += costs[labels[before]][written]
            found.append(EdgeLayout(edge, Place(written), Place(read), own))
        return Assignment(tuple(found), cost(labels, self.unary, self.pairs))

    def _port(self, op: int, side: str) -> int:
        number = next(n for n, edge in enumerate(self.region.edges) if getattr(edge, side) == op)
        return 2 * number + (side == "target")

    def _conversion(self, edge: Edge) -> Table:
        gather, turn = (evaluate(step, self._numbers) for step in steps(I if edge.wide else H))
        back = FORBIDDEN if edge.source is not None else gather  # rows that differ between slots are no tokens'
        return table({
            (0, 0): 0, (0, 1): gather, (0, 2): gather + turn, (1, 0): back, (1, 1): 0, (1, 2): turn,
            (2, 0): back + turn, (2, 1): turn, (2, 2): 0,
        })  # fmt: skip

    def _op(self, name: str) -> Table:
        costs = DECLARATIONS[name].on(self.region.target)
        return table({(int(a), int(b)): evaluate(e, self._numbers) for (a, b), e in costs.items()})


def assign(region: Region, numbers: Numbers, pins: Pins | None = None) -> Assignment:
    """The cheapest layouts of a region for given sizes.

    Args:
        region: its ops and edges.
        numbers: what costs are evaluated with (`region.Sizes.numbers`).
        pins: edges whose layout is given.
    """
    problem = Problem(region, numbers)
    for edge, place in (pins or {}).items():
        problem.pin(edge, place)
    return problem.solve()


def with_runners_up(region: Region, numbers: Numbers, pins: Pins | None = None) -> Assignment:
    """The same, and for each edge what the second best layout would cost: one more cut for each other layout."""
    problem = Problem(region, numbers)
    for edge, place in (pins or {}).items():
        problem.pin(edge, place)
    best = problem.solve()
    return Assignment(tuple(_runner_up(problem, best, layout) for layout in best.edges), best.picoseconds)


def _runner_up(problem: Problem, best: Assignment, layout: EdgeLayout) -> EdgeLayout:
    if layout.edge.source is None or layout.edge.target is None:
        return layout
    written = {written for _, written in DECLARATIONS[problem.region.ops[layout.edge.source]].on(problem.region.target)}
    others = {p: problem.cost_with(layout.edge.name, p) for p in Place if p in written - {layout.written}}
    place = min(others, key=lambda other: others[other], default=None)
    if place is None or others[place] >= FORBIDDEN:
        return layout
    return replace(layout, runner_up=place, margin=others[place] - best.picoseconds)


def price(region: Region, layouts: Sequence[EdgeLayout], numbers: Numbers) -> int:
    """What layouts that are possible cost with other numbers, in picoseconds."""
    total = 0
    for layout in layouts:
        gather, turn = steps(I if layout.edge.wide else H)
        places = {layout.written, layout.read} if layout.converts else set()
        passes = ((Place.TOKENS, gather), (Place.TILES, turn))
        total += sum(evaluate(step, numbers) for place, step in passes if place in places)
    for op, name in enumerate(region.ops):
        read = next(layout.read for layout in layouts if layout.edge.target == op)
        written = next(layout.written for layout in layouts if layout.edge.source == op)
        total += evaluate(DECLARATIONS[name].on(region.target)[read, written], numbers)
    return total


def token_major(region: Region, numbers: Numbers, like: Assignment | None = None) -> Assignment:
    """What a compiler does that knows no other order: every edge inside is written token by token, in slots.

    Args:
        region: its ops and edges.
        numbers: what costs are evaluated with.
        like: products read tiles where they do here, whatever it costs; by default where that is cheapest.
    """
    problem = Problem(region, numbers)
    for edge in region.edges:
        if None not in (edge.source, edge.target):
            problem.pin(edge.name, Place.SLOTS)
    products = {op for pair in region.together for op in pair}
    for layout in like.edges if like else ():
        if layout.edge.target in products and layout.read is Place.TILES:
            problem.pin(layout.edge.name, Place.TILES, written=False)
    return problem.solve()
