"""From a block's output back to the experts' products: which rows contribute to ``out[t, h]``, and when.

Everything that may stand between the experts and the output is linear in their rows: moving rows, masks, weights, sums
over slots or experts, accumulation by index. `Contributions` undoes it; what is left is a list of elements of matrix
products, each with the conditions and factors that stood around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from samoyeds_compile.graph.ops import ZEROS
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.conditions import Condition, Equal, Mask, substitute_condition
from samoyeds_compile.match.notation.index import (
    Coordinate,
    Count,
    Index,
    Piece,
    Size,
    constant,
    divide,
    mentions,
    of_atom,
    part_sizes,
    remainder,
    size_of,
    sizes_of,
    substitute,
)
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Contraction, Products
from samoyeds_compile.match.notation.reindex import Place, broadcast, index_parts
from samoyeds_compile.match.notation.rows import expert_in_split, rows_at
from samoyeds_compile.match.region import require


@dataclass(frozen=True)
class Contribution:
    """``sum over bound of [conditions] * factors * (element + bias)``.

    Attributes:
        value, index: an element; in a finished contribution, of a product with expert weights.
        bound: variables summed over.
        conditions: what must hold.
        factors: elements that it is multiplied with.
        scale: a number that it is multiplied with.
        bias: an element of a parameter that is added to it first.
        origin: the operand of the last sum that it is a part of unaltered: a base, if the experts have no part in it.
        dtypes: dtypes that the rows and sums have on the way.
        distinct: that an expert is named once by a token was relied on.
    """

    value: Value
    index: tuple[Index, ...]
    bound: tuple[Index, ...] = ()
    conditions: tuple[Condition, ...] = ()
    factors: tuple[Place, ...] = ()
    scale: float = 1.0
    bias: Place | None = None
    origin: Value | None = None
    dtypes: frozenset[torch.dtype] = frozenset()
    distinct: bool = False


UNINITIALISED = frozenset(("empty", "empty_like", "new_empty"))
MAX_ITEMS = 100_000


class Contributions:
    """Finds the contributions to one output.

    Attributes:
        experts: elements of products with parameters, with what stood around them.
        bases: what is neither a product nor zero.
    """

    def __init__(self, notation: Notation, products: Products, output: Value, index: tuple[Index, ...]) -> None:
        self.notation, self.products = notation, products
        self.output, self.index, self.feature = output, index, index[-1]
        self.experts: list[Contribution] = []
        self.bases: list[Contribution] = []
        stack = [Contribution(output, index)]
        for _ in range(MAX_ITEMS):
            if not stack:
                break
            stack.extend(reversed(self._expand(stack.pop())))
        require(not stack, "the block is too large", output)
        self.experts.sort(key=lambda c: c.value.position)

    def _expand(self, item: Contribution) -> list[Contribution]:
        """One step back; nothing where the way ends."""
        for value, index in self.notation.places(item.value, item.index):
            place = replace(item, value=value, index=index)
            found = self._operation(place)
            if found is not None:
                return found
        self.bases.append(place)
        return []

    def _operation(self, item: Contribution) -> list[Contribution] | None:
        """The element in terms of those it is computed from, None for an op that is not known here."""
        op = item.value.op
        if self.products.is_product(item.value):
            return self._product(item)
        if op in ZEROS or (op in ("full", "full_like", "new_full") and _fill_of(item.value) == 0):
            return []
        if op in ("cat", "stack"):
            return self._parts(item)
        rule = getattr(self, f"_{op}", None) if op in _RULES else None
        return rule(item) if rule is not None else None

    # ------------------------------------------------------------------------------- elementwise

    def _to(self, item: Contribution) -> list[Contribution] | None:
        source = item.value.input
        if not isinstance(source, Value) or source.dtype is None or not source.dtype.is_floating_point:
            return None
        if item.value is self.output:  # the result is rounded, not what is summed
            return [replace(item, value=source)]
        return [self._at(item, source, item.index)]

    _type_as = _to

    def _at(self, item: Contribution, value: Value, index: tuple[Index, ...], **changes: Any) -> Contribution:
        dtype = item.value.dtype
        seen = item.dtypes | {dtype} if dtype is not None else item.dtypes
        return replace(item, value=value, index=index, dtypes=seen, **changes)

    def _mul(self, item: Contribution) -> list[Contribution] | None:
        left, right = item.value.input, item.value.arg("other")
        for rows, other in ((left, right), (right, left)):
            if isinstance(other, (int, float)) and isinstance(rows, Value) and not isinstance(other, bool):
                return [self._at(item, rows, broadcast(item.index, rows), scale=item.scale * other)]
        if not (isinstance(left, Value) and isinstance(right, Value) and left.is_tensor and right.is_tensor):
            return None
        places = [(v, broadcast(item.index, v)) for v in (left, right)]
        with_rows = [mentions(i, self.feature) for _, i in places]
        if with_rows[0] == with_rows[1]:
            return None
        rows_at, factor = places if with_rows[0] else reversed(places)
        return [self._at(item, *rows_at, factors=(*item.factors, factor))]

    def _add(self, item: Contribution) -> list[Contribution] | None:
        left, right = item.value.input, item.value.arg("other")
        if item.value.arg("alpha", 1) != 1:
            return None
        for a, b in ((left, right), (right, left)):
            if isinstance(b, (int, float)) and b == 0 and isinstance(a, Value):
                return [self._at(item, a, broadcast(item.index, a))]
        if not (isinstance(left, Value) and isinstance(right, Value) and left.is_tensor and right.is_tensor):
            return None
        places = [(v, broadcast(item.index, v)) for v in (left, right)]
        for rows, bias in (places, places[::-1]):
            added = self.parameter(*bias)
            if added is not None and item.bias is None:
                return [self._at(item, *rows, bias=added)]
        return [self._at(item, v, i, origin=self._origin(item, v)) for v, i in places]

    def _base(self, item: Contribution, base: Value) -> Contribution:
        """What rows are added to or written over."""
        return self._at(item, base, item.index, origin=self._origin(item, base))

    def _origin(self, item: Contribution, operand: Value) -> Value | None:
        """The operand of a sum, if it is added to the output as it is."""
        altered = item.bound or item.conditions or item.factors or item.bias or item.scale != 1.0
        return operand if not altered and item.index == self.index else item.origin

    def parameter(self, value: Value, index: tuple[Index, ...]) -> Place | None:
        """The element itself, if it is a copy of one of an input of the graph, or of its cast."""
        *_, (end, place) = self.notation.places(value, index)
        if end.op in ("to", "type_as") and isinstance(end.input, Value):
            return (value, index) if self.parameter(end.input, place) else None
        return (value, index) if end.node.op in ("placeholder", "get_attr") else None

    def _sum(self, item: Contribution) -> list[Contribution] | None:
        source, axes = item.value.input, item.value.arg("dim")
        rank = len(source.shape)
        axes = [a % rank for a in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(a, int)]
        if not axes:
            return None
        rest, bound, index = list(item.index), [], []
        for axis, size in enumerate(sizes_of(source)):
            if axis not in axes:
                index.append(rest.pop(0))
                continue
            if item.value.arg("keepdim", False):
                rest.pop(0)
            bound.append(self.notation.variables.new(size))
            index.append(bound[-1])
        return [self._at(item, source, tuple(index), bound=(*item.bound, *bound))]

    # ------------------------------------------------------------------------------- products

    def _product(self, item: Contribution) -> list[Contribution] | None:
        product = self.products.of(item.value, item.index)
        if product is None:
            return None
        rows = [p for p in product.operands if mentions(p[1], self.feature)]
        if len(rows) != 1 or self.parameter(*rows[0]) is not None:
            if self._has_parameter(product):
                self.experts.append(item)
                return []
            return None
        if product.bias is not None:
            return None
        others = tuple(p for p in product.operands if p is not rows[0])
        bound = (*item.bound, *product.bound)
        return [self._at(item, *rows[0], bound=bound, factors=(*item.factors, *others))]

    def _has_parameter(self, product: Contraction) -> bool:
        return any(self.parameter(*p) is not None for p in product.operands)

    # ------------------------------------------------------------------------------- accumulation by index

    def _index_add(self, item: Contribution) -> list[Contribution] | None:
        value = item.value
        base, rows, chosen = value.input, value.arg("source", value.arg("3")), value.arg("index", value.arg("2"))
        axis = value.arg("dim", value.arg("1"))
        if value.arg("alpha", 1) != 1 or axis not in (0, -len(value.shape)) or not isinstance(rows, Value):
            return None
        return [
            self._base(item, base),
            *self._accumulated(item, chosen, rows),
        ]

    def _scatter_add(self, item: Contribution) -> list[Contribution] | None:
        value = item.value
        base, rows, chosen = value.input, value.arg("src", value.arg("3")), value.arg("index", value.arg("2"))
        if value.arg("dim", value.arg("1")) not in (0, -len(value.shape)) or not isinstance(rows, Value):
            return None
        if tuple(chosen.shape) != tuple(rows.shape):
            return None
        return [
            self._base(item, base),
            *self._accumulated(item, chosen, rows),
        ]

    def _scatter_reduce(self, item: Contribution) -> list[Contribution] | None:
        value = item.value
        sums = value.arg("reduce", value.arg("4")) == "sum" and value.arg("include_self", value.arg("5", True)) is True
        return self._scatter_add(item) if sums else None

    def _accumulated(self, item: Contribution, chosen: Value, rows: Value) -> list[Contribution]:
        """Rows r of ``rows`` with ``chosen[r] == t``, for the output's ``t``."""
        solved = rows_at(chosen, item.index, self.notation)
        bound, conditions = (*item.bound, *solved.bound), (*item.conditions, *solved.conditions)
        index = (solved.row, *item.index[1:])
        return [self._at(item, rows, broadcast(index, rows), bound=bound, conditions=conditions)]

    # ------------------------------------------------------------------------------- writing by index

    def _index_put(self, item: Contribution) -> list[Contribution] | None:
        value = item.value
        base, rows = value.input, value.arg("values")
        parts = index_parts(base, value.arg("indices"))
        if parts is None or not isinstance(rows, Value) or any(p != slice(None) for p in parts[1:] if not _tensor(p)):
            return None
        chosen = [p for p in parts if _tensor(p)]
        mask = self._mask_of(chosen)
        if value.arg("accumulate", False):
            if len(chosen) != 1 or mask is not None:
                return None
            return [
                self._base(item, base),
                *self._accumulated(item, chosen[0], rows),
            ]
        added = self._read_back(base, value.arg("indices"), rows)
        if added is not None and len(chosen) == 1 and mask is None:  # out[t] += rows, each t at most once
            distinct = replace(item, distinct=True)
            return [
                self._base(item, base),
                *self._accumulated(distinct, chosen[0], added),
            ]
        return self._overwritten(item, base, rows if added is None else None, added, mask)

    def _overwritten(
        self, item: Contribution, base: Value, rows: Value | None, added: Value | None, mask: Value | None
    ) -> list[Contribution] | None:
        """``out[mask] = rows`` or ``out[mask] += rows``."""
        if mask is None:
            return None
        entry = item.index[: len(mask.shape)]
        source = rows if rows is not None else added
        assert source is not None
        index = broadcast((of_atom(Count(mask, entry)), *item.index[len(entry) :]), source)
        true = (*item.conditions, Mask(mask, entry))
        below = item.conditions if added is not None else (*item.conditions, Mask(mask, entry, wanted=False))
        return [
            replace(self._base(item, base), conditions=below),
            self._at(item, source, index, conditions=true),
        ]

    def _mask_of(self, chosen: list[Value]) -> Value | None:
        """The mask whose true entries are indexed, given itself or as the coordinates of its entries."""
        if chosen[0].dtype == torch.bool:
            return self.notation.canon(chosen[0])
        row = self.notation.variables.new(size_of(chosen[0].shape[0]))
        found = [self.notation.integer(c, (row,)).atom if len(c.shape) == 1 else None for c in chosen]
        masks = {a.mask for a in found if isinstance(a, Coordinate) and a.index == row}
        axes = [a.axis for a in found if isinstance(a, Coordinate)]
        mask = next(iter(masks), None)
        whole = mask is not None and len(masks) == 1 and axes == list(range(len(mask.shape)))
        return mask if whole and len(axes) == len(chosen) else None

    def _read_back(self, base: Value, indices: Any, rows: Value) -> Value | None:
        """The rows added, if the rows written are those that stood there plus something."""
        if rows.op != "add" or rows.arg("alpha", 1) != 1:
            return None
        for old, new in ((rows.input, rows.arg("other")), (rows.arg("other"), rows.input)):
            if isinstance(old, Value) and old.op == "index" and old.input is base and isinstance(new, Value):
                same = self._same_indices(old.arg("indices"), indices)
                return new if same else None
        return None

    def _same_indices(self, a: Any, b: Any) -> bool:
        def canonical(part: Any) -> Any:
            return self.notation.canon(part) if _tensor(part) else repr(part)

        return [canonical(p) for p in a] == [canonical(p) for p in b]

    def _masked_fill(self, item: Contribution) -> list[Contribution] | None:
        mask, rows = item.value.arg("mask"), item.value.input
        if not isinstance(mask, Value) or item.value.arg("value") != 0:
            return None
        hides = Mask(self.notation.canon(mask), broadcast(item.index, mask), wanted=False)
        return [self._at(item, rows, broadcast(item.index, rows), conditions=(*item.conditions, hides))]

    # ------------------------------------------------------------------------------- parts

    def _parts(self, item: Contribution) -> list[Contribution] | None:
        """``cat`` of the experts' rows in order, or a ``stack`` of their outputs."""
        parts = item.value.input
        if not isinstance(parts, tuple) or not all(isinstance(p, Value) for p in parts):
            return None
        rank = len(item.index) - (item.value.op == "stack")
        if any(len(p.shape) != rank for p in parts):  # ``cat`` takes ``tensor([])`` beside tensors of any rank
            return None
        axis = item.value.arg("dim", 0) % len(item.index)
        return self._stacked(item, parts, axis) if item.value.op == "stack" else self._joined(item, parts, axis)

    def _stacked(self, item: Contribution, parts: tuple[Value, ...], axis: int) -> list[Contribution]:
        position = item.index[axis]
        index = (*item.index[:axis], *item.index[axis + 1 :])
        found = []
        for number, part in enumerate(parts):
            inside = self._at(item, part, index)
            if position in item.bound:  # a sum over the stack: one term for each part
                found.append(substituted(inside, position, constant(number)))
            else:
                condition = Equal(position, constant(number))
                found.append(replace(inside, conditions=(*item.conditions, condition)))
        return found

    def _joined(self, item: Contribution, parts: tuple[Value, ...], axis: int) -> list[Contribution] | None:
        position = item.index[axis]
        lengths = [sizes_of(p)[axis] for p in parts]
        if len(set(lengths)) == 1 and isinstance(lengths[0], int):
            return self._joined_alike(item, parts, axis, lengths[0])
        split = next((s for s in self.notation.graph.with_op("split") if _lengths(s) == lengths), None)
        if axis != 0 or split is None or position.atom is None or not hasattr(position.atom, "permutation"):
            return None
        expert = expert_in_split(split, position, self.notation)
        found = []
        for number, part in enumerate(parts):
            row = of_atom(Piece(split, number, position))
            conditions = (*item.conditions, Equal(expert, constant(number)))
            found.append(self._at(item, part, (row, *item.index[1:]), conditions=conditions))
        return found

    def _joined_alike(self, item: Contribution, parts: tuple[Value, ...], axis: int, length: int) -> list[Contribution]:
        """Parts of one length: which part a position lies in is its quotient by the length."""
        number, row = divide(item.index[axis], length), remainder(item.index[axis], length)
        index = (*item.index[:axis], row, *item.index[axis + 1 :])
        found = []
        for n, part in enumerate(parts):
            conditions = (*item.conditions, Equal(number, constant(n)))
            found.append(self._at(item, part, index, conditions=conditions))
        return found


_RULES = frozenset(
    "to type_as mul add sum index_add scatter_add scatter_reduce index_put masked_fill".split()
)  # ops with a method of that name


def substituted(item: Contribution, variable: Index, by: Index) -> Contribution:
    """A contribution with a bound variable replaced."""
    replaced = {variable.atom: by}.get

    def moved(place: Place) -> Place:
        return place[0], tuple(substitute(i, replaced) for i in place[1])

    return replace(
        item,
        index=moved((item.value, item.index))[1],
        bound=tuple(b for b in item.bound if b != variable),
        conditions=tuple(substitute_condition(c, replaced) for c in item.conditions),
        factors=tuple(moved(f) for f in item.factors),
        bias=None if item.bias is None else moved(item.bias),
    )


def _lengths(split: Value) -> list[Size]:
    return part_sizes(split, split.arg("dim", 0))


def _fill_of(value: Value) -> Any:
    return value.arg("fill_value", value.arg("2" if value.op == "new_full" else "1"))


def _tensor(part: Any) -> bool:
    return isinstance(part, Value) and part.is_tensor
