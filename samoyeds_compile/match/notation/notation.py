"""Elements of integer tensors as index expressions; the functional view of one graph, in index notation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.notation.index import (
    ZERO,
    Element,
    Index,
    Size,
    Sorted,
    Variables,
    add,
    constant,
    coordinate,
    divide,
    flatten,
    of_atom,
    rank_of,
    remainder,
    scale,
    size_of,
    sizes_of,
    sorted_at,
)
from samoyeds_compile.match.notation.reindex import Place, broadcast, index_parts, step

MAX_STEPS = 200
"""Longest chain of ops that only move elements; a guard against loops, not a limit on models."""


class Notation:
    """Evaluates elements of one graph's tensors."""

    def __init__(self, graph: ValueGraph) -> None:
        self.graph = graph
        self.variables = Variables()
        self._canonical: dict[Value, Value] = {}
        self._by_key: dict[Any, Value] = {}

    def index_of(self, value: Value) -> tuple[Index, ...]:
        """A fresh variable for each axis of a value."""
        return tuple(self.variables.new(n) for n in sizes_of(value))

    # ------------------------------------------------------------------------------- equal values

    def canon(self, value: Value) -> Value:
        """The first value that is computed by the same op from the same operands; for integers and masks."""
        stack = [value]
        while stack:
            current = stack[-1]
            pending = [o for o in current.operands if o not in self._canonical and _is_discrete(o)]
            if current in self._canonical or not pending:
                self._canonical.setdefault(current, self._first_alike(current))
                stack.pop()
            else:
                stack.extend(pending)
        return self._canonical[value]

    def _first_alike(self, value: Value) -> Value:
        if not _is_discrete(value) or value.node.op not in ("call_function", "call_method"):
            return value
        try:
            return self._by_key.setdefault((value.op, self._key(value.args)), value)
        except TypeError:  # an argument that cannot be hashed
            return value

    def _key(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self._canonical.get(argument, argument)
        if isinstance(argument, dict):
            return tuple((k, self._key(v)) for k, v in sorted(argument.items()))
        if isinstance(argument, (tuple, list)):
            return tuple(self._key(a) for a in argument)
        if isinstance(argument, slice):
            return "slice", self._key(argument.start), self._key(argument.stop), self._key(argument.step)
        return type(argument), argument

    # ------------------------------------------------------------------------------- places

    def places(self, value: Value, index: tuple[Index, ...]) -> Iterator[Place]:
        """The element itself, then what it is a copy of, and so on to where it is computed."""
        place: Place | None = (value, index)
        for _ in range(MAX_STEPS):
            if place is None:
                return
            yield place
            place = step(*place, self) or self._unsorted(*place)

    def _unsorted(self, value: Value, index: tuple[Index, ...]) -> Place | None:
        """``t.sort()[0][s]`` is ``t[perm[s]]``, and rows put back by a permutation are rows."""
        if value.op == "item" and value.input.op == "sort" and value.arg("key") == 0:
            permutation = self.permutation_of(value.input)
            if permutation is not None and len(index) == 1:
                return value.input.input, (sorted_at(permutation, index[0]),)
        if value.op in ("index_put", "index_copy", "scatter"):
            return self._restored(value, index)
        return None

    def _restored(self, value: Value, index: tuple[Index, ...]) -> Place | None:
        """``out[perm] = rows`` for a permutation: every row of ``out`` is written once."""
        rows = value.arg("values", value.arg("source", value.arg("src")))
        if not isinstance(rows, Value) or value.arg("accumulate", False) or value.arg("reduce") is not None:
            return None
        if value.op == "index_put":
            parts = index_parts(value.input, value.arg("indices"))
            chosen = parts[0] if parts else None
        else:
            chosen = value.arg("index") if value.arg("dim") == 0 else None
        if not isinstance(chosen, Value) or chosen.dtype == torch.bool or not index:
            return None
        same_rows = sizes_of(chosen)[0] == sizes_of(value)[0]
        if not same_rows or (value.op == "scatter" and tuple(chosen.shape) != tuple(rows.shape)):
            return None
        row = self.variables.new(sizes_of(chosen)[0])
        others = index[1:] if value.op == "scatter" else ()
        atom = self.integer(chosen, (row, *others)[: len(chosen.shape)]).atom
        if isinstance(atom, Sorted) and atom.index == row:
            return rows, broadcast((rank_of(atom.permutation, index[0]), *index[1:]), rows)
        return None

    # ------------------------------------------------------------------------------- integers

    def integer(self, value: Value, index: tuple[Index, ...]) -> Index:
        """An element of an integer tensor."""
        *_, (value, index) = self.places(value, index)
        rule = getattr(self, f"_integer_{value.op}", None)
        found = rule(value, index) if rule is not None else None
        return found if found is not None else of_atom(Element(self.canon(value), index))

    def _integer_to(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        return self.integer(value.input, index) if _is_discrete(value.input) else None

    _integer_type_as = _integer_to

    def _integer_arange(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        start, stride = value.arg("start", 0), value.arg("step", 1)
        return add(scale(index[0], stride), constant(start)) if isinstance(start, int) else None

    def _integer_floor_divide(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        return self._with_number(value, index, divide)

    def _integer_div(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        rounds = value.arg("rounding_mode") in ("floor", "trunc")  # the same for what is not negative
        return self._with_number(value, index, divide) if rounds else None

    def _integer_remainder(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        return self._with_number(value, index, remainder)

    _integer_mod = _integer_fmod = _integer_remainder

    def _integer_mul(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        return self._with_number(value, index, scale)

    def _with_number(self, value: Value, index: tuple[Index, ...], operation: Any) -> Index | None:
        number = self._number(value.arg("other"))
        if number is None or not _is_discrete(value.input):
            return None
        return operation(self.integer(value.input, index), number)  # type: ignore[no-any-return]

    def _number(self, operand: Any) -> Size | None:
        if isinstance(operand, Value):
            return None if operand.is_tensor else size_of(operand.example)
        return operand if isinstance(operand, int) else None

    def _integer_add(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        if value.arg("alpha", 1) != 1:
            return None
        total = ZERO
        for operand in (value.input, value.arg("other")):
            number = self._number(operand)
            if number is not None:
                total = add(total, constant(number))
            elif isinstance(operand, Value) and _is_discrete(operand) and operand.is_tensor:
                total = add(total, self.integer(operand, broadcast(index, operand)))
            else:
                return None
        return total

    def _integer_argsort(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        return self._sorting(value, value, index)

    def _integer_item(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        whole, number = value.input, value.arg("key")
        if whole.op == "sort" and number == 1:
            return self._sorting(whole, value, index)
        if whole.op in ("where", "nonzero") and isinstance(number, int):
            return coordinate(self.canon(whole.input), number % len(whole.input.shape), index[0])
        return None

    def _integer_nonzero(self, value: Value, index: tuple[Index, ...]) -> Index | None:
        axis = index[1].number if len(index) == 2 else None
        return None if axis is None else coordinate(self.canon(value.input), axis, index[0])

    def _sorting(self, sort: Value, permutation: Value, index: tuple[Index, ...]) -> Index | None:
        """The permutation that sorts a vector; of one that is a permutation itself, its inverse."""
        if not _is_ascending(sort):
            return None
        row = self.variables.new(sizes_of(sort.input)[0])
        atom = self.integer(sort.input, (row,)).atom
        if isinstance(atom, Sorted) and atom.index == row:
            return rank_of(atom.permutation, index[0])
        return sorted_at(self.canon(permutation), index[0])

    def permutation_of(self, sort: Value) -> Value | None:
        """The value that holds the permutation of a sort, if the graph has one."""
        found = next((u for u in sort.users if u.op == "item" and u.arg("key") == 1), None)
        return None if found is None or not _is_ascending(sort) else self.canon(found)

    def flat(self, value: Value, index: tuple[Index, ...]) -> Index:
        """Row-major position of an index in a value."""
        return flatten(index, sizes_of(value))


def _is_ascending(sort: Value) -> bool:
    one_axis = len(sort.input.shape) == 1 and sort.arg("dim", -1) in (-1, 0)
    return one_axis and not sort.arg("descending", False)


def _is_discrete(value: Value) -> bool:
    """Whether a value is made of integers or booleans, or of tuples of them, or is a size."""
    leaf = value.example
    while isinstance(leaf, (tuple, list)) and leaf:
        leaf = leaf[-1]
    if isinstance(leaf, torch.Tensor):
        return not leaf.dtype.is_floating_point and not leaf.dtype.is_complex
    return isinstance(leaf, (int, torch.SymInt, bool))
