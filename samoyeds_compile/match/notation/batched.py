"""Experts over rows that are already dispatched: ``y[e, c] = F_e(d[e, c])`` (capacity, expert choice, soft slots)."""

from __future__ import annotations

from dataclasses import dataclass

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.notation.assemble import linears
from samoyeds_compile.match.notation.conditions import Equal
from samoyeds_compile.match.notation.contributions import Contribution, Contributions
from samoyeds_compile.match.notation.experts import ExpertFunction, ExpertReader
from samoyeds_compile.match.notation.index import Index, sizes_of
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Products
from samoyeds_compile.match.region import MoERegion, require


@dataclass(frozen=True)
class _Row:
    """One contribution: the axis that counts experts, the expert's number if it is a single one, its function."""

    axis: int
    number: int | None
    function: ExpertFunction


class Batched:
    """Reads one output.

    Attributes:
        looks_like_a_block: the last reading found experts.

    Raises:
        Decline: the output is not the result of experts over rows of their own.
    """

    def __init__(self, graph: ValueGraph, notation: Notation, products: Products, output: Value) -> None:
        self.graph, self.notation, self.products, self.output = graph, notation, products, output
        self.index, self.sizes = notation.index_of(output), sizes_of(output)
        self.looks_like_a_block = False

    def region(self) -> MoERegion:
        """The region that ends in the output, members excepted."""
        found = Contributions(self.notation, self.products, self.output, self.index)
        require(
            found.experts and not found.bases, "the output is not made by products with expert weights", self.output
        )
        rows = [self._row(c) for c in found.experts]
        self.looks_like_a_block = True
        first = rows[0]
        numbers = [r.number for r in rows]
        require(all(r.axis == first.axis for r in rows), "experts lie along different axes", self.output)
        every = numbers == [None] or sorted(n for n in numbers if n is not None) == list(range(self.sizes[first.axis]))
        require(every and len(set(numbers)) == len(rows), "not every expert has rows", self.output)
        for other in rows[1:]:
            require_alike(first.function, other.function)
        require(all(r.function.x[0] is first.function.x[0] for r in rows), "experts have different inputs", self.output)
        gate, up, down = linears([(r.number, r.function) for r in rows])
        require(down.num_experts == self.sizes[first.axis], "the rows are for another number of experts", self.output)
        require(down.out_features == up.in_features, "the experts change the width of the rows", self.output)
        return MoERegion(
            family="capacity", graph=self.graph, x=first.function.x[0], expert_ids=None, expert_weights=None, top_k=1,
            gate=gate, up=up, down=down, activation=first.function.activation, gate_up_layout=first.function.layout,
            output=self.output, expert_axis=first.axis,
        )  # fmt: skip

    def _row(self, contribution: Contribution) -> _Row:
        plain = not (contribution.bound or contribution.factors) and contribution.scale == 1.0
        require(plain, "the experts' rows are weighed or summed", contribution.value)
        reader = ExpertReader(self.notation, self.products, contribution, self.index[-1], self.sizes[:-1])
        number, axis = self._expert_of(contribution)
        function = reader.read(self._is_row(axis, number))
        require(not function.inputs and function.scale == 1.0, "the rows are weighed on the way in", contribution.value)
        expert = function.expert
        one = set(function.experts) == {expert}
        require(one, "the projections of a row belong to different experts", contribution.value)
        if number is None:
            at = [i for i, part in enumerate(self.index[:-1]) if part == expert and part.terms]
            require(len(at) == 1, "no axis of the rows counts the experts", contribution.value)
            return _Row(at[0], None, function)
        require(
            expert is None or expert.number == number, "the weights are those of another expert", contribution.value
        )
        return _Row(axis, number, function)

    def _expert_of(self, contribution: Contribution) -> tuple[int | None, int]:
        """(number, axis) of a contribution that counts for one expert only."""
        if not contribution.conditions:
            return None, 0
        condition = contribution.conditions[0]
        require(len(contribution.conditions) == 1 and isinstance(condition, Equal), "the rows are masked",
                contribution.value)  # fmt: skip
        assert isinstance(condition, Equal)
        at = [i for i, part in enumerate(self.index[:-1]) if part == condition.left]
        require(len(at) == 1, "the rows are put together in a way that is not known", contribution.value)
        return condition.right.number, at[0]

    def _is_row(self, axis: int, number: int | None):  # type: ignore[no-untyped-def]
        """Whether an element is the row of this expert, in a tensor of the output's shape."""

        def is_row(value: Value, index: tuple[Index, ...], inner: Index) -> bool:
            floating = value.dtype is not None and value.dtype.is_floating_point
            if not floating or sizes_of(value) != self.sizes or index[-1] != inner:
                return False
            wanted = list(self.index[:-1])
            if number is not None:
                wanted[axis] = Index(number)
            return index[:-1] == tuple(wanted)

        return is_row


def require_alike(a: ExpertFunction, b: ExpertFunction) -> None:
    """Two experts differ in nothing but their weights."""
    at = b.down.product
    require(a.activation == b.activation and a.layout == b.layout, "experts have different activations", at)
    require(len(a.projections) == len(b.projections), "experts have different structures", at)
    for p, q in zip(a.projections, b.projections, strict=True):
        require(p.weight.transposed == q.weight.transposed, "experts store their weights differently", at)
        require((p.bias is None) == (q.bias is None), "some experts have a bias and others have none", at)
        require(p.weight.value.shape == q.weight.value.shape, "experts have different shapes", at)
        same = p.product.dtype == q.product.dtype and p.weight.value.dtype == q.weight.value.dtype
        require(same, "experts have different dtypes", at)
        stacked = p.weight.expert is not None
        require((q.weight.expert is not None) == stacked, "some experts share a stack and others do not", at)
        require(not stacked or p.weight.value is q.weight.value, "experts use different stacks", at)
