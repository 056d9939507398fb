"""Random inputs of a region at the sizes of a replay, each according to its role."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.graph.extract import known_size, symbol
from samoyeds_compile.graph.sizes import Size, replace_leaves
from samoyeds_compile.graph.values import Value, hint
from samoyeds_compile.match.region import Linear, MoERegion, leaves
from samoyeds_compile.replay.cases import Case, all_experts
from samoyeds_compile.replay.numbers import Dimensions

NumberOf = Callable[[Size], int]
Shape = tuple[Any, ...]
"""Of each dimension a `Size`, a number that stays, or (``rows``, ``hidden`` or ``width``, factor)."""


class Inputs:
    """Makes up the inputs of one region.

    Attributes:
        sizes: every distinct size among the shapes.
    """

    def __init__(self, region: MoERegion) -> None:
        self.region = region
        self.routing = {*leaves(region.expert_ids), *leaves(region.expert_weights)}
        self.ids = set(leaves(region.expert_ids)) - set(region.flags)
        self.x = set(leaves(region.x))
        self.matrices = {w for p in region.projections for w in p.weights}
        known = {value: shape for p in region.projections for value, shape in _parameters(region, p)}
        self.shapes = {value: known.get(value) or self._shape(value) for value in region.inputs}
        self.sizes: dict[Size, int] = {}
        replace_leaves(list(self.shapes.values()), Size, lambda size: self.sizes.setdefault(size, -1))

    def _shape(self, value: Value) -> Shape:
        if not value.is_tensor:
            return (symbol(value, "plain"),)
        if value is self.region.x and self.region.offsets is not None:
            return (("rows", 1), ("hidden", 1))
        if value is self.region.offsets:
            return (self.region.num_experts,)
        shape = _shape_of(value)
        if value is self.region.x:
            by_expert = self.region.batched and shape[0] == self.region.num_experts
            leading = [shape[0]] if by_expert else []
            return (*leading, *_leading(value, shape[len(leading) : -1], len(leading)), ("hidden", 1))
        return self._guess(value, shape)

    def _guess(self, value: Value, shape: tuple[int, ...]) -> Shape:
        """Leading sizes count tokens; the last one is K or E of what routes, and features of everything else."""
        if value in self.routing:
            prefers = "plain" if len(shape) > 1 else "tokens"
        else:
            carried = self.region.carried_activation
            prefers = "width" if carried is not None and value in carried.externals else "hidden"
        last = len(shape) - 1
        return (*_leading(value, shape[:-1]), *(_input_size(value, n, last, prefers) for n in shape[-1:]))

    def draw(self, case: Case, new: Dimensions, number_of: NumberOf, round_: int) -> list[Any]:
        """One set of inputs; the same for the same arguments.

        Args:
            case: how to route.
            new: the dimensions of the replay.
            number_of: the number for each of ``sizes``.
            round_: which of the repetitions of the case it is.
        """
        return _Draw(self, case, new, number_of, round_).all()


def _shape_of(value: Value) -> tuple[int, ...]:
    if not all(map(known_size, value.shape)):
        raise ValueError(f"the shape of {value} is not known before the graph runs")
    return tuple(map(hint, value.shape))


def _parameters(region: MoERegion, projection: Linear) -> Iterator[tuple[Value, Shape]]:
    """Shapes of a projection's weights and biases."""
    into: Any = ("hidden", 1)
    out: Any = ("width", projection.out_features // region.intermediate_size)
    if projection is region.down:
        into, out = ("width", 1), ("hidden", 1)
    for bias in leaves(projection.bias):
        shape = _shape_of(bias)
        if shape[-1:] == (projection.out_features,):
            yield bias, (*shape[:-1], out)
    for weight in projection.weights:
        yield weight, (*_shape_of(weight)[:-2], *((into, out) if projection.transposed else (out, into)))


def _leading(value: Value, shape: tuple[int, ...], first: int = 0) -> Shape:
    return tuple(_input_size(value, n, first + i, "tokens") for i, n in enumerate(shape))


def _input_size(value: Value, number: int, axis: int, prefers: str) -> Any:
    symbolic = isinstance(value.shape[axis], torch.SymInt)
    return Size(number, f"input.{prefers}", prefers, symbolic) if number > 0 else number


class _Draw:
    def __init__(self, inputs: Inputs, case: Case, new: Dimensions, number_of: NumberOf, round_: int) -> None:
        self.inputs, self.case, self.new, self.number_of, self.round = inputs, case, new, number_of, round_
        self.generator = torch.Generator().manual_seed(len(case.name) + round_)
        self.experts = inputs.region.num_experts
        self.device = next(leaves(inputs.region.x)).example.device

    def all(self) -> list[Any]:
        shapes = {v: self._real_shape(s) for v, s in self.inputs.shapes.items()}
        named = {v: self._columns(s) for v, s in shapes.items() if v in self.inputs.ids and _is_integer(v)}
        table, first = self._ids(max(1, sum(named.values()))), 0
        drawn = []
        for value, shape in shapes.items():
            if not value.is_tensor:
                drawn.append(shape[0])
                continue
            columns = named.get(value, 0)
            tensor = self._tensor(value, shape, table[:, first : first + columns] if columns else table)
            first += columns
            drawn.append(tensor.to(self.device))
        return drawn

    def _real_shape(self, shape: Shape) -> tuple[Any, ...]:
        def real(size: Any) -> Any:
            if isinstance(size, tuple):
                known = {"rows": self.new.rows, "hidden": self.new.hidden, "width": self.new.width}
                return known[size[0]] * size[1]
            return self.number_of(size) if isinstance(size, Size) else size

        return tuple(map(real, shape))

    def _columns(self, shape: tuple[int, ...]) -> int:
        """How many experts ids of this shape name for each token; 0 if they are no ids of tokens."""
        numel, tokens = math.prod(shape), max(self.new.rows, 1)
        return numel // tokens if numel % tokens == 0 else 0

    def _ids(self, columns: int) -> Tensor:
        generator = torch.Generator().manual_seed(len(self.case.name))  # the same start in every round
        ids = self.case.ids(self.new.rows, columns, self.experts, generator)
        if self.round and self.case.ids is all_experts:
            ids = (ids + self.round * self.new.rows * columns) % self.experts
        return ids

    def _tensor(self, value: Value, shape: tuple[int, ...], ids: Tensor) -> Tensor:
        dtype = value.dtype or torch.float32
        if value in self.inputs.region.flags:
            some = torch.rand(shape, generator=self.generator) < 0.7
            return (self._flags(value, shape, ids) & some).to(dtype)
        if dtype == torch.bool:
            return self._flags(value, shape, ids)
        if _is_integer(value):
            return self._integers(value, shape, ids).to(dtype)
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        if value in self.inputs.matrices:
            drawn = drawn * (3 * shape[-1] ** -0.5)
        elif value in self.inputs.routing:
            drawn = drawn.sigmoid()
        elif value in self.inputs.x and not self.case.contiguous:
            drawn = _non_contiguous(drawn)
        return drawn.to(dtype)

    def _integers(self, value: Value, shape: tuple[int, ...], ids: Tensor) -> Tensor:
        if value is self.inputs.region.offsets:
            return torch.bincount(ids.flatten(), minlength=self.experts).cumsum(0)
        if value not in self.inputs.ids:
            return torch.randint(2, shape, generator=self.generator)
        if math.prod(shape) != ids.numel():
            return torch.arange(math.prod(shape)).remainder(self.experts).view(shape)
        by_choice = len(shape) == 2 and shape == (ids.shape[1], ids.shape[0]) and shape[0] != shape[1]
        return (ids.t() if by_choice else ids).reshape(shape).clone()

    def _flags(self, value: Value, shape: tuple[int, ...], ids: Tensor) -> Tensor:
        """Which experts a token goes to, or anything."""
        chooses = value in self.inputs.routing and shape[-1:] == (self.experts,)
        if not chooses or math.prod(shape[:-1]) != len(ids) or int(ids.max()) >= self.experts:
            return torch.rand(shape, generator=self.generator) < 0.5
        return torch.zeros(len(ids), self.experts, dtype=torch.bool).scatter(1, ids, True).view(shape)


def _is_integer(value: Value) -> bool:
    dtype = value.dtype
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool


def _non_contiguous(tensor: Tensor) -> Tensor:
    """The same numbers, column by column; of more than two dimensions every other number in memory."""
    if tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor
