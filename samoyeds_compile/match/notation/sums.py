"""Sums of products of indicators: what they are made of, and how they are simplified.

See `samoyeds_compile.match.notation.indicators`, which reads them from a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import Index, Size, substitute
from samoyeds_compile.match.notation.reindex import Place
from samoyeds_compile.match.notation.terms import Call, Leaf, substitute_term

Replace = Callable[[Any], "Index | None"]


@dataclass(frozen=True)
class Is:
    """``[entry == expert]``; entries are known to be less than ``below`` where that is given."""

    entry: Index
    expert: Index
    below: Size | None = field(default=None, compare=False)


@dataclass(frozen=True)
class At:
    """``[position == index]``; ``place`` holds the position."""

    index: Index
    position: Sum
    place: Place = field(compare=False)


@dataclass(frozen=True)
class Below:
    """``[position < bound]``; ``place`` holds the comparison, negated if ``negated``."""

    position: Sum
    bound: Size
    place: Place = field(compare=False)
    negated: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Flag:
    """An entry of a boolean tensor of which no more is known."""

    place: Place


@dataclass(frozen=True)
class Nonzero:
    """A term that is not 0."""

    term: Any


Test = Is | At | Below | Flag | Nonzero


@dataclass(frozen=True)
class Tally:
    """A sum of entries of ``source`` along ``axis``: of all, or (``running``) of those up to ``index[axis]``."""

    source: Value
    axis: int
    index: tuple[Index, ...]
    running: bool


@dataclass(frozen=True)
class Product:
    """``number * term * product of tallies * product of tests``."""

    number: float = 1.0
    term: Any = 1.0
    tallies: frozenset[Tally] = frozenset()
    tests: frozenset[Test] = frozenset()


Sum = frozenset[Product]
NOTHING: Sum = frozenset()
ONE: Sum = frozenset((Product(),))

MOST_PRODUCTS = 24
"""Sums that would become longer are not multiplied out; the gating of GShard has two products."""


def number_sum(number: float) -> Sum:
    """A number."""
    return frozenset((Product(float(number)),)) if number else NOTHING


def added(*sums: Sum) -> Sum:
    """The sum of sums; what is alike but for its number becomes one product."""
    found: dict[Product, float] = {}
    for product in (p for s in sums for p in s):
        key = replace(product, number=1.0)
        found[key] = found.get(key, 0.0) + product.number
    return frozenset(replace(key, number=n) for key, n in found.items() if n)


def multiplied(a: Sum, b: Sum) -> Sum | None:
    """The product of two sums; None if a product would have a tally twice or too many parts."""
    if len(a) * len(b) > MOST_PRODUCTS:
        return None
    found = []
    for p in a:
        for q in b:
            if p.tallies & q.tallies:
                return None
            terms = [t for t in (p.term, q.term) if t != 1.0]
            term = Call(torch.mul, tuple(terms)) if len(terms) == 2 else terms[0] if terms else 1.0
            found.append(Product(p.number * q.number, term, p.tallies | q.tallies, p.tests | q.tests))
    return added(*(normalised(p) for p in found))


def renamed(product: Product, replaced: Replace) -> Sum:
    """A product with atoms of its indices replaced."""
    tallies = frozenset(replace(t, index=_moved(t.index, replaced)) for t in product.tallies)
    tests = frozenset(renamed_test(t, replaced) for t in product.tests)
    return normalised(Product(product.number, substitute_term(product.term, replaced), tallies, tests))


def renamed_sum(total: Sum, replaced: Replace) -> Sum:
    """A sum with atoms of its indices replaced."""
    return added(*(renamed(p, replaced) for p in total))


def renamed_test(test: Test, replaced: Replace) -> Test:
    """A test with atoms of its indices replaced."""
    if isinstance(test, Is):
        return replace(test, entry=substitute(test.entry, replaced), expert=substitute(test.expert, replaced))
    if isinstance(test, Nonzero):
        return Nonzero(substitute_term(test.term, replaced))
    place = (test.place[0], _moved(test.place[1], replaced))
    if isinstance(test, At):
        return At(substitute(test.index, replaced), renamed_sum(test.position, replaced), place)
    if isinstance(test, Below):
        return replace(test, position=renamed_sum(test.position, replaced), place=place)
    return Flag(place)


def _moved(index: tuple[Index, ...], replaced: Replace) -> tuple[Index, ...]:
    return tuple(substitute(i, replaced) for i in index)


def normalised(product: Product) -> Sum:
    """A product as a sum: what its tests say of each other's positions is put in, what always holds is left out."""
    tests = set(product.tests)
    while True:
        known = frozenset(tests)
        new = {_given(test, known - {test}) for test in tests}
        if new == tests:
            break
        tests = new
    kept = set()
    for test in tests:
        holds = _always(test)
        if holds is False:
            return NOTHING
        if holds is None:
            kept.add(test)
    return frozenset((replace(product, tests=frozenset(kept)),))


def _given(test: Test, known: frozenset[Test]) -> Test:
    """A test whose position is simplified by tests that hold as well."""
    if not isinstance(test, (At, Below)):
        return test
    position = added(*(frozenset((replace(p, tests=p.tests - known),)) for p in test.position))
    return replace(test, position=position)


def _always(test: Test) -> bool | None:
    """Whether a test holds whatever the data are; None if that depends."""
    if not isinstance(test, Is):
        return None
    if test.entry == test.expert:
        return True
    numbers = test.entry.number, test.expert.number
    return False if None not in numbers else None


def negative(total: Sum) -> Sum:
    """-sum."""
    return frozenset(replace(p, number=-p.number) for p in total)


def parts_of(part: Any) -> list[Index]:
    """Every index in a term, a test or a product."""
    if isinstance(part, Product):
        inner = [part.term, *part.tests]
        return [i for t in part.tallies for i in t.index] + [i for p in inner for i in parts_of(p)]
    if isinstance(part, Call):
        return [i for argument in part.arguments for i in parts_of(argument)]
    if isinstance(part, Leaf):
        return list(part.index)
    if isinstance(part, Is):
        return [part.entry, part.expert]
    if isinstance(part, At):
        return [part.index, *(i for p in part.position for i in parts_of(p))]
    if isinstance(part, Below):
        return [i for p in part.position for i in parts_of(p)]
    if isinstance(part, Nonzero):
        return parts_of(part.term)
    return list(part.place[1]) if isinstance(part, Flag) else []
