"""Masks, positions and tables of weights as sums of products of indicators (Iverson brackets).

What decides which row stands in which place of an expert is written with one-hot rows, running counts and comparisons:

    [ids[t] == e]        one_hot(ids), a scatter of ones, ids == arange(E)
    counts[t, e]         cumsum of such a mask; its total is a sum over all rows
    [position < C]       the comparison with the capacity
    [position == c]      one_hot(position)

Every op between them is a polynomial in these. As ``[p] * [p]`` is ``[p]`` and a sum over e of ``[ids == e] * f(e)`` is
``f(ids)``, polynomials that mean the same mostly are equal objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from samoyeds_compile.graph.ops import ONES, ZEROS
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import (
    Element,
    Index,
    Size,
    Var,
    atoms,
    constant,
    mentions,
    size_of,
    sizes_of,
)
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Contraction, Products
from samoyeds_compile.match.notation.reindex import Place, axis_summed, broadcast
from samoyeds_compile.match.notation.segments import chosen_from, names_once
from samoyeds_compile.match.notation.sums import (
    NOTHING,
    ONE,
    At,
    Below,
    Flag,
    Is,
    Nonzero,
    Product,
    Sum,
    Tally,
    added,
    multiplied,
    negative,
    normalised,
    number_sum,
    renamed,
)
from samoyeds_compile.match.notation.terms import Call, Leaf

MAX_DEPTH = 40
"""How many ops to look through; the gating of GShard has about twenty."""

_EXACT = (torch.float32, torch.float64, torch.int32, torch.int64)
"""Dtypes in which counts of rows are exact."""


class Indicators:
    """Evaluates elements of one graph's tensors.

    Args:
        notation, products: of the graph.
        cell: the variables that count experts and their places; a float that does not depend on them is a term as it
            is, unless it is a mask or a position.
    """

    def __init__(self, notation: Notation, products: Products, cell: Sequence[Index]) -> None:
        self.notation, self.products = notation, products
        self.cell = {a for i in cell for a in atoms(i)}
        self._slots: dict[Any, Index] = {}
        self._depth = 0

    @property
    def slots(self) -> set[Index]:
        """The variables made for the slot in which a row of ids names an expert."""
        return set(self._slots.values())

    def of(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        """The element as a sum, None if it is made in a way that is not known."""
        if self._depth >= MAX_DEPTH:
            return None
        self._depth += 1
        try:
            found = self._of(value, index)
        finally:
            self._depth -= 1
        inexact = found is not None and any(p.tallies for p in found) and not _holds_counts(value)
        return None if inexact else found

    def _of(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        place = value, index
        for place in self.notation.places(value, index):
            rule = _RULES.get(place[0].op)
            if rule is None:
                continue
            found = rule(self, *place)
            if found is not None and all(p.term == 1.0 for p in found):
                return found
            return self._leaf(*place) or found or self._unknown(*place)
        return self._leaf(*place) or self._unknown(*place)

    def _leaf(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        """A number of a token, whatever it is made of."""
        of_token = not any(a in self.cell or isinstance(a, Element) for i in index for a in atoms(i))
        return frozenset((Product(term=Leaf(value, index)),)) if of_token and _floats(value) else None

    def _unknown(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        if value.dtype == torch.bool:
            return frozenset((Product(tests=frozenset((Flag((value, index)),))),))
        return frozenset((Product(term=Leaf(value, index)),)) if _floats(value) else None

    def operand(self, operand: Any, index: tuple[Index, ...]) -> Sum | None:
        """An operand of an elementwise op, at an element of the result."""
        if isinstance(operand, Value):
            return self.of(operand, broadcast(index, operand)) if operand.is_tensor else None
        return number_sum(float(operand)) if isinstance(operand, (int, float)) else None

    def product_of(self, places: Sequence[Place]) -> Sum | None:
        """The product of elements."""
        total: Sum | None = ONE
        for place in places:
            factor = self.of(*place)
            total = None if total is None or factor is None else multiplied(total, factor)
        return total

    # ------------------------------------------------------------------------------- sums over a variable

    def summed(self, total: Sum, variable: Index) -> Sum | None:
        """The sum over all values of ``variable``, where tests leave one value, or one at most."""
        return self._each(total, lambda product: self._summed(product, variable))

    def _each(self, total: Sum, rule: Callable[[Product], Sum | None]) -> Sum | None:
        found = [rule(product) for product in total]
        return None if None in found else added(*(f for f in found if f is not None))

    def _summed(self, product: Product, variable: Index) -> Sum | None:
        if not variable.terms:
            return frozenset((product,))
        for test in product.tests:
            if isinstance(test, Is) and test.expert == variable and _covers(variable, test):
                return renamed(product, {variable.atom: test.entry}.get)
        for test in product.tests:
            if isinstance(test, Is) and mentions((test.entry,), variable):
                return self._of_one_slot(product, test, variable)
        return None

    def _of_one_slot(self, product: Product, test: Is, variable: Index) -> Sum | None:
        """The slot that names an expert, of which there is one at most, always by the same variable."""
        element = test.entry.atom
        if not isinstance(element, Element) or len(element.index) < 2 or element.index[-1] != variable:
            return None
        if not names_once(element.value):
            return None
        slot = self.slot(element.value, element.index[:-1], test.expert, sizes_of(element.value)[-1])
        return renamed(product, {variable.atom: slot}.get)

    def slot(self, ids: Value, row: tuple[Index, ...], expert: Index, size: Size) -> Index:
        """The slot in which a row of ids names an expert: a variable, if it is not known."""
        named = expert.atom
        if isinstance(named, Element) and named.value is ids and named.index[:-1] == row:
            return named.index[-1]
        return self._slots.setdefault((ids, row, expert), self.notation.variables.new(size))

    # ------------------------------------------------------------------------------- rules

    def _cast(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        found = self.of(value.input, index) if isinstance(value.input, Value) else None
        if found is None or value.dtype is None:
            return None
        if value.dtype == torch.bool:
            return self.nonzero(found)
        rounds = not value.dtype.is_floating_point and any(p.term != 1.0 or p.number % 1 for p in found)
        if rounds:
            return None
        return added(*(frozenset((_cast_term(p, value.dtype),)) for p in found))

    def nonzero(self, total: Sum) -> Sum | None:
        """Whether an element is not 0.

        Several products must not hold at once: those that are places are proven not to, later on (see `capacity`).
        """
        places = all(any(isinstance(t, At) for t in p.tests) for p in total)
        if any(p.tallies or p.number <= 0 for p in total) or not (len(total) <= 1 or places):
            return None
        tests = (p.tests if p.term == 1.0 else p.tests | {Nonzero(p.term)} for p in total)
        return added(*(frozenset((Product(tests=t),)) for t in tests))

    def _mul(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        sides = [self.operand(o, index) for o in (value.input, value.arg("other"))]
        return None if None in sides else multiplied(*sides)  # type: ignore[arg-type]

    def _and(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        sides = [self.operand(o, index) for o in (value.input, value.arg("other"))]
        masks = [None if s is None else self.nonzero(s) for s in sides]
        known = value.dtype == torch.bool and None not in masks
        return multiplied(*masks) if known else None  # type: ignore[arg-type]

    def _add(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        sides = [self.operand(o, index) for o in (value.input, value.arg("other"))]
        if None in sides or value.arg("alpha", 1) != 1 or value.dtype == torch.bool:
            return None
        left, right = sides
        assert left is not None and right is not None
        return added(left, negative(right) if value.op == "sub" else right)

    def _div(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        """By a number of a token."""
        total, divisor = (self.operand(o, index) for o in (value.input, value.arg("other")))
        if total is None or divisor is None or len(divisor) != 1 or value.arg("rounding_mode") is not None:
            return None
        (by,) = divisor
        if by.tests or by.tallies or not isinstance(by.term, (Leaf, Call)) or any(p.tallies for p in total):
            return None
        denominator = by.term if by.number == 1.0 else Call(torch.mul, (by.term, by.number))
        return frozenset(replace(p, term=Call(torch.div, (p.term, denominator))) for p in total)

    def _not(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        found = self.operand(value.input, index) if value.input.dtype == torch.bool else None
        return None if found is None else added(ONE, negative(found))

    def _eq(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        left, right = value.input, value.arg("other")
        for entry, other in ((left, right), (right, left)):
            number = self._index(other, index)
            if isinstance(entry, Value) and number is not None and not isinstance(number.atom, Element):
                return self._equal(entry, broadcast(index, entry), number)
        return None

    def _index(self, operand: Any, index: tuple[Index, ...]) -> Index | None:
        if isinstance(operand, int) and not isinstance(operand, bool):
            return constant(operand)
        if not isinstance(operand, Value) or not operand.is_tensor or operand.dtype is None or _floats(operand):
            return None
        return None if operand.dtype == torch.bool else self.notation.integer(operand, broadcast(index, operand))

    def _equal(self, entry: Value, place: tuple[Index, ...], number: Index, below: Size | None = None) -> Sum | None:
        """``[entry == number]``, by what the entry is: a position, or an expert."""
        position = self.of(entry, place)
        if position is not None and any(p.tallies for p in position):
            return frozenset((Product(tests=frozenset((At(number, position, (entry, place)),))),))
        found = self._index(entry, place) if not _floats(entry) else None
        return None if found is None else normalised(Product(tests=frozenset((Is(found, number, below),))))

    def _one_hot(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        return self._equal(value.input, index[:-1], index[-1], sizes_of(value)[-1])

    def _compared(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        """A position with the capacity; any other comparison with 0 is that of a mask."""
        bound = value.arg("other")
        bound = size_of(bound.example) if isinstance(bound, Value) and not bound.is_tensor else bound
        position = self.operand(value.input, index)
        if position is None or not isinstance(value.input, Value) or isinstance(bound, Value):
            return None
        if not any(p.tallies for p in position):
            pure = all(p.term == 1.0 for p in position)
            return self.nonzero(position) if value.op == "gt" and bound == 0 and pure else None
        if isinstance(bound, float):
            if not bound.is_integer():
                return None
            bound = int(bound)
        below = value.op in ("lt", "le")
        limit = bound + 1 if value.op in ("le", "gt") else bound
        test = Below(position, limit, (value, index), negated=not below)
        found: Sum = frozenset((Product(tests=frozenset((test,))),))
        return found if below else added(ONE, negative(found))

    def _ne(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        total = self.operand(value.input, index) if value.arg("other") == 0 else None
        return None if total is None else self.nonzero(total)

    def _where(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        if value.arg("self") is None or value.arg("other") is None:
            return None
        return self._picked(value.input, value.arg("self"), value.arg("other"), index)

    def _masked_fill(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        return self._picked(value.arg("mask"), value.arg("value"), value.input, index)

    def _picked(self, mask: Any, left: Any, right: Any, index: tuple[Index, ...]) -> Sum | None:
        holds, inside, outside = (self.operand(o, index) for o in (mask, left, right))
        if holds is None or inside is None or outside is None:
            return None
        parts = multiplied(holds, inside), multiplied(added(ONE, negative(holds)), outside)
        return None if None in parts else added(*(p for p in parts if p is not None))

    def _sum(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        summed = axis_summed(value, index)
        if summed is None:
            return None
        source, (axis, rest) = value.input, summed
        variable = self.notation.variables.new(sizes_of(source)[axis])
        inner = self.of(source, (*rest[:axis], variable, *rest[axis:]))
        found = None if inner is None else self.summed(inner, variable)
        if found is not None or inner is None or not all(p.term == 1.0 for p in inner):
            return found
        return _tally(source, axis, (*rest[:axis], constant(0), *rest[axis:]), running=False)

    def _any(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        found = self._sum(value, index) if value.arg("dim") is not None else None
        single = found is not None and len(found) == 1 and not any(p.tallies or p.term != 1.0 for p in found)
        return found if single else None

    def _cumsum(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        axis = value.arg("dim")
        if not isinstance(axis, int):
            return None
        axis %= len(index)
        source, before = value.input, self._shifted(value.input, axis)
        if before is None:
            return _tally(source, axis, index, running=True)
        own = self.of(before, index)
        return None if own is None else added(_tally(before, axis, index, running=True), negative(own))

    def _shifted(self, value: Value, axis: int) -> Value | None:
        """What ``pad`` moves on by one row, putting zeros in front: its running sum counts the rows before."""
        widths = value.arg("pad")
        if value.op != "pad" or not isinstance(widths, tuple) or len(widths) % 2:
            return None
        fill, mode = value.arg("value"), value.arg("mode", "constant")
        from_last = len(value.shape) - 1 - axis
        wanted = [(1, -1) if i == from_last else (0, 0) for i in range(len(widths) // 2)]
        pairs = [tuple(widths[2 * i : 2 * i + 2]) for i in range(len(widths) // 2)]
        moved = pairs == wanted and from_last < len(pairs) and mode == "constant" and fill in (None, 0, 0.0)
        return value.input if moved and isinstance(value.input, Value) else None

    def _scatter(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        """``zeros.scatter(-1, ids, source)`` with ids that differ within a row; ones along any axis are a mask."""
        axis, ids = value.arg("dim"), value.arg("index")
        source = value.arg("src", value.arg("value"))
        base = self.of(value.input, index)
        if (
            not isinstance(axis, int)
            or not isinstance(ids, Value)
            or value.arg("reduce") is not None
            or base != NOTHING
        ):
            return None
        if len(index) < 2 or axis % len(index) != len(index) - 1 or not names_once(ids):
            ones = source == 1 or (isinstance(source, Value) and self.of(source, (constant(0),) * len(index)) == ONE)
            return frozenset((Product(tests=frozenset((Flag((value, index)),))),)) if ones else None
        marked, place = self._marked(ids, index, sizes_of(value)[-1])
        written = self.of(source, place) if isinstance(source, Value) else number_sum(float(source))
        return None if written is None else multiplied(marked, written)

    def _marked(self, ids: Value, index: tuple[Index, ...], size: Size) -> tuple[Sum, tuple[Index, ...]]:
        """Where a scatter along the last axis writes: at an expert, or at a position; and the entry that says so."""
        if sizes_of(ids)[-1] == 1:
            place = (*index[:-1], constant(0))
            marked = self._equal(ids, place, index[-1], size)
            if marked is not None:
                return marked, place
        slot = self.slot(self.notation.canon(ids), index[:-1], index[-1], sizes_of(ids)[-1])
        place = (*index[:-1], slot)
        test = Is(self.notation.integer(ids, place), index[-1], size)
        return frozenset((Product(tests=frozenset((test,))),)), place

    def _contraction(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        product = self.products.of(value, index)
        return None if product is None else self._contracted(product)

    def _contracted(self, product: Contraction) -> Sum | None:
        total = self.product_of(product.operands) if product.bias is None else None
        for variable in product.bound:
            total = None if total is None else self.summed(total, variable)
        return total

    def _zeros(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        return NOTHING

    def _ones(self, value: Value, index: tuple[Index, ...]) -> Sum | None:
        return ONE


def _covers(variable: Index, test: Is) -> bool:
    """Whether a variable takes every value that the entry may have."""
    size, element = variable.atom.size if isinstance(variable.atom, Var) else 1, test.entry.atom
    return test.below == size or (isinstance(element, Element) and chosen_from(element.value) == size)


def _tally(source: Value, axis: int, index: tuple[Index, ...], running: bool) -> Sum:
    return frozenset((Product(tallies=frozenset((Tally(source, axis, index, running),))),))


def _cast_term(product: Product, dtype: torch.dtype) -> Product:
    if isinstance(product.term, float) or not dtype.is_floating_point:
        return product
    return replace(product, term=Call(torch.Tensor.to, (product.term, dtype)))


def _floats(value: Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point


def _holds_counts(value: Value) -> bool:
    """Whether the dtype of a value holds every count."""
    return value.dtype in _EXACT


_RULES: dict[str, Callable[[Indicators, Value, tuple[Index, ...]], Sum | None]] = {
    **dict.fromkeys(("to", "type_as"), Indicators._cast),
    "mul": Indicators._mul,
    **dict.fromkeys(("logical_and", "bitwise_and"), Indicators._and),
    **dict.fromkeys(("add", "sub"), Indicators._add),
    "div": Indicators._div,
    **dict.fromkeys(("logical_not", "bitwise_not", "invert"), Indicators._not),
    "eq": Indicators._eq,
    "one_hot": Indicators._one_hot,
    **dict.fromkeys(("lt", "le", "gt", "ge"), Indicators._compared),
    "ne": Indicators._ne,
    "where": Indicators._where,
    "masked_fill": Indicators._masked_fill,
    "sum": Indicators._sum,
    **dict.fromkeys(("any", "amax"), Indicators._any),
    "cumsum": Indicators._cumsum,
    "scatter": Indicators._scatter,
    **dict.fromkeys(("einsum", "bmm", "matmul", "mm"), Indicators._contraction),
    **dict.fromkeys(ZEROS, Indicators._zeros),
    **dict.fromkeys(ONES, Indicators._ones),
}
