"""Routing weights and masks in index notation: what a factor is where a token goes to an expert, and elsewhere.

An entry of a dense table of weights [T, E] made from the top k is ``w[t, k]`` if some ``ids[t, k]`` is e, and 0
otherwise. `Score` says just that. Factors that depend on tokens and slots only are leaves: the rewrite takes them as
they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from samoyeds_compile.graph.ops import ONES, ZEROS
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import (
    Element,
    Index,
    atoms,
    sizes_of,
)
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.reindex import axis_summed, broadcast, index_parts
from samoyeds_compile.match.notation.terms import Chosen, Leaf, Score, _applied, combine, negated

_UNARY: dict[str, Callable[..., Any]] = {
    name: getattr(torch, name) for name in "sigmoid exp relu tanh sqrt square abs neg softplus log1p".split()
    if hasattr(torch, name)
}  # fmt: skip


_BINARY: dict[str, Callable[..., Any]] = {
    "mul": torch.mul, "div": torch.div, "add": torch.add, "sub": torch.sub,
}  # fmt: skip


_BOOLEAN_AND = frozenset(("logical_and", "bitwise_and"))


_BOOLEAN_NOT = frozenset(("logical_not", "bitwise_not", "invert"))


MAX_DEPTH = 30
"""How many ops to look through; routers have about ten."""


_TESTS = frozenset(("eq", "ne", "one_hot", "scatter", "scatter_add"))


_THROUGH = frozenset(
    "view reshape flatten unsqueeze squeeze permute transpose t getattr slice select expand repeat repeat_interleave "
    "contiguous item chunk unbind logical_not bitwise_not invert logical_and and_".split()
)


class Scores:
    """Evaluates the factors of one contribution.

    Args:
        notation: of the graph.
        tokens: the index variables of a token.
        slots: variables that count the slots of a token.
        experts: variables that count experts; nothing that depends on them is a leaf.
    """

    def __init__(
        self, notation: Notation, tokens: Sequence[Index], slots: Sequence[Index], experts: Sequence[Index]
    ) -> None:
        self.notation = notation
        self.tokens = frozenset(a for i in tokens for a in atoms(i))
        self.slots = frozenset(a for i in slots for a in atoms(i))
        self.experts = frozenset(a for i in experts for a in atoms(i))
        self._depth = 0
        self._testing: dict[Value, bool] = {}

    def of(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        """The score of an element, None if it depends on experts in a way that is not understood."""
        if self._depth >= MAX_DEPTH:
            return None
        self._depth += 1
        try:
            return self._of(value, index)
        finally:
            self._depth -= 1

    def _of(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        if self._is_leaf(value, index) and self._has_slots(index) and not self._tests_ids(value):
            return Score(self._leaf(value, index))
        found = self._expanded(value, index)
        if found is not None and (found.chosen is not None or isinstance(found.term, float)):
            return found
        if self._is_leaf(value, index):
            return Score(self._leaf(value, index))
        return found or self._looked_up(value, index)

    def _is_leaf(self, value: Value, index: tuple[Index, ...]) -> bool:
        """Whether the element depends on token and slot alone; a table of ids is not looked through."""
        floating = value.dtype is not None and value.dtype.is_floating_point
        known = self.tokens | (self.slots - self.experts)
        return floating and all(a in known for i in index for a in atoms(i))

    def _leaf(self, value: Value, index: tuple[Index, ...]) -> Leaf:
        """The element, or what it is a copy of in the nearest matrix or vector."""
        for place in self.notation.places(value, index):
            if not self._is_leaf(*place):
                break
            if len(place[0].shape) <= 2:
                return Leaf(*place)
        return Leaf(value, index)

    def _has_slots(self, index: tuple[Index, ...]) -> bool:
        return any(a in self.slots and a not in self.experts for i in index for a in atoms(i))

    def _looked_up(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        """An entry of a table of scores; the assembly decides whether it can be gathered."""
        places = list(self.notation.places(value, index))
        floating = value.dtype is not None and value.dtype.is_floating_point
        return Score(Leaf(*places[-1])) if floating else None

    # ------------------------------------------------------------------------------- expansion

    def _expanded(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        for place in self.notation.places(value, index):
            if self._has_slots(place[1]) and self._is_leaf(*place) and not self._tests_ids(place[0]):
                return Score(self._leaf(*place))
            rule = self._rule(place[0].op)
            if rule is not None:
                return rule(*place)
        return None

    def _rule(self, op: str) -> Callable[[Value, tuple[Index, ...]], Score | None] | None:
        if op in ZEROS or op in ONES:
            return lambda value, index: Score(float(op in ONES))
        if op in _UNARY:
            return lambda value, index: self._mapped(value, index, _UNARY[op])
        if op in _BINARY:
            return self._binary
        if op in _BOOLEAN_NOT:
            return self._not
        if op in _BOOLEAN_AND:
            return self._and
        return getattr(self, f"_{op}", None) if op in _METHODS else None

    def _mapped(self, value: Value, index: tuple[Index, ...], function: Callable[..., Any]) -> Score | None:
        inner = self.of(value.input, index) if isinstance(value.input, Value) else None
        return None if inner is None else inner.map(function)

    def _to(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        if not isinstance(value.input, Value):
            return None
        inner = self.of(value.input, index)
        if inner is None or isinstance(inner.term, float) or value.dtype is None:
            return inner
        return inner.map(torch.Tensor.to, value.dtype) if value.dtype.is_floating_point else inner

    _type_as = _to

    def _full(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        fill = value.arg("fill_value", value.arg("1"))
        return Score(float(fill)) if isinstance(fill, (int, float)) else None

    _full_like = _full

    def _new_full(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        fill = value.arg("fill_value", value.arg("2"))
        return Score(float(fill)) if isinstance(fill, (int, float)) else None

    def _eq(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        sides = [self._integer(o, index) for o in (value.input, value.arg("other"))]
        return self._chosen(*sides)

    def _integer(self, operand: Any, index: tuple[Index, ...]) -> Index | None:
        if isinstance(operand, int) and not isinstance(operand, bool):
            return Index(operand)
        if not isinstance(operand, Value) or not operand.is_tensor:
            return None
        dtype = operand.dtype
        if dtype is None or dtype.is_floating_point or dtype == torch.bool:
            return None
        return self.notation.integer(operand, broadcast(index, operand))

    def _chosen(self, a: Index | None, b: Index | None) -> Score | None:
        if a is None or b is None:
            return None
        for ids, expert in ((a, b), (b, a)):
            if isinstance(ids.atom, Element) and (expert.number is not None or expert.atom in self.experts):
                return Score(1.0, Chosen(ids, expert))
        return None

    def _tests_ids(self, value: Value, depth: int = 8) -> bool:
        """Whether an element depends on a comparison of ids, and so perhaps on the expert."""
        if value not in self._testing:
            self._testing[value] = value.op in _TESTS or (
                depth > 0 and (value.op in _THROUGH or value.op in _METHODS or value.op in _BINARY)
                and any(self._tests_ids(o, depth - 1) for o in value.operands if o.is_tensor)
            )  # fmt: skip
        return self._testing[value]

    def _one_hot(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        return self._chosen(self._integer(value.input, index[:-1]), index[-1])

    def _ne(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        return negated(self._eq(value, index))

    def _not(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        return negated(self.of(value.input, index)) if isinstance(value.input, Value) else None

    def _and(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        return self._binary(value, index, torch.mul)

    def _gt(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        """``mask > 0`` of a mask of numbers."""
        inner = self.of(value.input, index) if value.arg("other") == 0 else None
        is_mask = inner is not None and inner.chosen is not None and inner.term == 1.0 and inner.other == 0.0
        return inner if is_mask else None

    def _binary(
        self, value: Value, index: tuple[Index, ...], function: Callable[..., Any] | None = None
    ) -> Score | None:
        if value.arg("alpha", 1) != 1 or value.arg("rounding_mode") is not None:
            return None
        function = function or _BINARY[value.op]
        found: list[Any] = []
        for operand in (value.input, value.arg("other")):
            if isinstance(operand, Value) and operand.is_tensor:
                found.append(self.of(operand, broadcast(index, operand)))
            else:
                found.append(Score(float(operand)) if isinstance(operand, (int, float)) else None)
        return combine(function, *found)

    def _where(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        mask, left, right = value.input, value.arg("self"), value.arg("other")
        if left is None or right is None or not isinstance(mask, Value):
            return None
        return self._picked(self.of(mask, broadcast(index, mask)), left, right, index)

    def _masked_fill(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        mask = value.arg("mask")
        if not isinstance(mask, Value):
            return None
        return self._picked(self.of(mask, broadcast(index, mask)), value.arg("value"), value.input, index)

    def _picked(self, mask: Score | None, left: Any, right: Any, index: tuple[Index, ...]) -> Score | None:
        """``left`` where the mask holds, ``right`` elsewhere; of the two one must be a number."""
        if mask is None or mask.chosen is None or {mask.term, mask.other} != {0.0, 1.0}:
            return None
        inside, outside = (left, right) if mask.term == 1.0 else (right, left)
        term, other = (self._operand(o, index) for o in (inside, outside))
        if term is None or other is None or not isinstance(other.term, float) or other.chosen is not None:
            return None
        if term.chosen is not None and term.chosen != mask.chosen:
            return None
        return Score(term.term, mask.chosen, other.term, mask.distinct or term.distinct)

    def _operand(self, operand: Any, index: tuple[Index, ...]) -> Score | None:
        if isinstance(operand, Value):
            return self.of(operand, broadcast(index, operand)) if operand.is_tensor else None
        return Score(float(operand)) if isinstance(operand, (int, float)) else None

    # ------------------------------------------------------------------------------- tables from the top k

    def _scatter(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        """``base.scatter(-1, ids, w)``: w where an id names the expert."""
        axis, ids = value.arg("dim", value.arg("1")), value.arg("index", value.arg("2"))
        source = value.arg("src", value.arg("value", value.arg("3")))
        if not isinstance(axis, int) or not isinstance(ids, Value) or value.arg("reduce") is not None:
            return None
        axis %= len(index)
        slot = self._new_slot(sizes_of(ids)[axis])
        place = (*index[:axis], slot, *index[axis + 1 :])
        return self._written(value.input, index, self.notation.integer(ids, place), index[axis], source, place)

    def _scatter_add(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        found = self._scatter(value, index)
        return found if found is not None and found.other == 0.0 else None

    def _index_put(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        """``base[arange(T)[:, None], ids] = w``."""
        parts = index_parts(value.input, value.arg("indices"))
        if parts is None or len(parts) != 2 or not all(isinstance(p, Value) for p in parts) or len(index) != 2:
            return None
        rows, ids = parts
        if rows.dtype == torch.bool or ids.dtype == torch.bool or len(ids.shape) != 2:
            return None
        slot = self._new_slot(sizes_of(ids)[1])
        place = (index[0], slot)
        if self.notation.integer(rows, broadcast(place, rows)) != index[0]:
            return None
        expert = self.notation.integer(ids, place)
        return self._written(value.input, index, expert, index[1], value.arg("values"), place)

    def _written(
        self, base: Value, index: tuple[Index, ...], ids: Index, expert: Index, source: Any, place: tuple[Index, ...]
    ) -> Score | None:
        below = self.of(base, index)
        if below is None or not isinstance(below.term, float) or below.chosen is not None:
            return None
        chosen = self._chosen(ids, expert)
        term = self._operand(source, place) if isinstance(source, Value) else Score(float(source))
        if chosen is None or term is None or term.chosen is not None:
            return None
        return Score(term.term, chosen.chosen, below.term, distinct=True)

    def _new_slot(self, size: Any) -> Index:
        slot = self.notation.variables.new(size)
        self.slots = self.slots | set(atoms(slot))
        return slot

    def _sum(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        """A sum over the slots of a token, in which one slot at most counts for an expert."""
        summed = axis_summed(value, index)
        if summed is None:
            return None
        source, (axis, rest) = value.input, summed
        slot = self._new_slot(sizes_of(source)[axis])
        inner = self.of(source, (*rest[:axis], slot, *rest[axis:]))
        if inner is None or inner.chosen is None or inner.other != 0.0:
            return None
        mentioned = any(a in set(atoms(slot)) for i in inner.chosen.element.index for a in atoms(i))
        return inner if mentioned or not slot.terms else None

    def _any(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        found = self._sum(value, index) if value.arg("dim") is not None else None
        return replace(found, distinct=True) if found is not None and found.term == 1.0 else None

    _amax = _any

    def _softmax(self, value: Value, index: tuple[Index, ...]) -> Score | None:
        """Over experts, where all but the chosen ones are minus infinity: a softmax over the slots of the token."""
        axis = value.arg("dim")
        inner = self.of(value.input, index) if isinstance(axis, int) and isinstance(value.input, Value) else None
        if inner is None or inner.chosen is None or inner.other != -math.inf:
            return None
        if index[axis] != inner.chosen.expert or inner.chosen.element.index[-1].terms == frozenset():
            return None
        dtype = value.arg("dtype")
        term = _applied(torch.softmax, (inner.term, -1), (("dtype", dtype),) if dtype is not None else ())
        return Score(term, inner.chosen, 0.0, distinct=True)

    __softmax = _softmax


_METHODS = frozenset(
    "to type_as full full_like new_full eq one_hot ne gt where masked_fill scatter scatter_add index_put sum any amax "
    "softmax".split()
)
