"""Dispatch into places: when combination undoes a dispatch that gives every kept row a place of its own.

    y[e, c] = F_e(sum over s' of D[s', e, c] * x[s']);   out[s] = sum over e, c of W[s, e, c] * y[e, c]

With D a sum over j of ``[ids_j[s'] == e] * [c == position_j[s']] * (kept)``, each (e, c) holds one row at most if the
positions count the rows of an expert one after the other. Then out[s] is the sum over j of w_j[s] * F_ids_j[s](x[s])
over the kept ones, and neither D nor W is needed. (GShard, arXiv 2006.16668, algorithm 1; Switch, arXiv 2101.03961,
appendix F.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.contributions import Contribution, substituted
from samoyeds_compile.match.notation.index import (
    ZERO,
    Element,
    Index,
    Quotient,
    Size,
    Var,
    add,
    atoms,
    flatten,
    mentions,
    of_atom,
    scale,
    sizes_of,
    substitute,
    unflatten,
)
from samoyeds_compile.match.notation.indicators import Indicators
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Contraction, Products
from samoyeds_compile.match.notation.reindex import Place
from samoyeds_compile.match.notation.segments import names_once
from samoyeds_compile.match.notation.sums import (
    At,
    Below,
    Flag,
    Is,
    Nonzero,
    Product,
    Replace,
    Sum,
    Tally,
    Test,
    parts_of,
    renamed,
    renamed_sum,
    renamed_test,
)
from samoyeds_compile.match.notation.terms import Call, Given, Leaf, times
from samoyeds_compile.match.region import require

NO_MASK = "the rows are dispatched by a tensor that is no mask of places"
SHARED = "rows may share a place of an expert"


@dataclass(frozen=True)
class Choice:
    """One product of a dispatch or combination: where one of a token's choices of an expert puts its row.

    Attributes:
        ids: the expert, an entry of the ids.
        term: the weight.
        position: the place with that expert.
        tests: what must hold for the row to be kept.
        places: how many rows the expert takes.
        place: the element that holds the position.
    """

    ids: Index
    term: Any
    position: Sum
    tests: frozenset[Test]
    places: Size
    place: Place

    @property
    def holding(self) -> frozenset[Test]:
        """What holds for a row that has a place: its tests, and that its position is one."""
        return self.tests | {Below(self.position, self.places, self.place)}

    @property
    def element(self) -> Element:
        """The entry of the ids."""
        assert isinstance(self.ids.atom, Element)
        return self.ids.atom

    def renamed(self, replaced: Replace) -> Choice:
        """With atoms of its indices replaced; its term is left as it is."""
        tests = frozenset(renamed_test(t, replaced) for t in self.tests)
        return replace(
            self, ids=substitute(self.ids, replaced), position=renamed_sum(self.position, replaced), tests=tests
        )


@dataclass(frozen=True)
class Kept:
    """A choice, and the elements that must be true for it to count."""

    ids: Index
    term: Any
    conditions: tuple[Any, ...]


@dataclass(frozen=True)
class Dispatch:
    """Rows that are dispatched into places of their own and combined.

    Attributes:
        x: the token's row.
        expert: the variable that counts experts.
        kept: the choices of a token.
        places: how many rows an expert takes.
    """

    x: Place
    expert: Index
    kept: tuple[Kept, ...]
    places: Size


@dataclass(frozen=True)
class _Ranked:
    """A choice whose position is a running count, after the totals of earlier choices."""

    choice: Choice
    running: Tally
    totals: frozenset[Tally]
    constant: float


class Capacity:
    """Reads the dispatch and the combination of one contribution.

    Args:
        notation, products: of the graph.
        tokens: flat index of the output's token.
        contribution: to the output; what stands around the expert's row is the combination.
    """

    def __init__(self, notation: Notation, products: Products, tokens: Index, contribution: Contribution) -> None:
        self.notation, self.products, self.tokens = notation, products, tokens
        self.contribution, self.cell = contribution, contribution.bound
        self.indicators = Indicators(notation, products, self.cell)

    def read(self, source: Place, inner: Index) -> Dispatch:
        """What becomes of a token.

        Args:
            source: the element of the dispatched rows that enters the expert.
            inner: its feature index.

        Raises:
            Decline: rows may share a place, or the combination does not read what was dispatched.
        """
        product = self._product(source)
        (rows,) = [p for p in product.operands if mentions(p[1], inner)]
        (mask,) = [p for p in product.operands if p is not rows]
        x, token_of = self._token(rows, product)
        combination, expert = self._choices(self.indicators.product_of(self.contribution.factors), source[0])
        dispatch, same = self._choices(self.indicators.of(*mask), source[0])
        require(expert == same, "rows are dispatched and combined along different axes", source[0])
        require(all(c.term == 1.0 for c in dispatch), "the rows are weighted where they are dispatched", source[0])
        weighted = any(isinstance(t, Nonzero) for c in combination for t in c.tests)
        require(not weighted, "the weights of a row are 0 where other numbers are", source[0])
        self._require_own_places(dispatch, product)
        moved = [c.renamed(token_of.get) for c in dispatch]
        for choice in combination:
            found = any(_reads(choice, c) for c in moved)
            require(found, "the combination reads places that were not filled", source[0])
        kept = tuple(self._kept(c, source[0]) for c in combination)
        return Dispatch(x, expert, kept, combination[0].places)

    # ------------------------------------------------------------------------------- reading

    def _product(self, source: Place) -> Contraction:
        product = self.products.of(*source)
        two = product is not None and len(product.operands) == 2 and product.bias is None
        require(two, "the rows are dispatched by a product that is not understood", source[0])
        assert product is not None
        return product

    def _token(self, rows: Place, product: Contraction) -> tuple[Place, dict[Any, Index]]:
        """(the row of the output's token among the rows, what the variables summed over are for it)."""
        value, index = rows
        wanted = unflatten(self.tokens, sizes_of(value)[:-1])
        found: dict[Any, Index] = {}
        for mine, token in zip(index[:-1], wanted, strict=True):
            if mine != token and mine in product.bound:
                found[mine.atom] = token
        require(len(found) == len([b for b in product.bound if b.terms]), NO_MASK, product.value)
        return (value, tuple(substitute(i, found.get) for i in index)), found

    def _choices(self, total: Sum | None, at: Value) -> tuple[list[Choice], Index]:
        """The products as choices, and the variable that counts experts."""
        require(total, NO_MASK, at)
        assert total is not None
        found = [self._choice(product, self.cell, at) for product in total]
        experts = {expert for _, expert in found}
        require(len(experts) == 1, "rows are dispatched along different axes", at)
        return sorted((c for c, _ in found), key=_order), experts.pop()

    def _choice(self, product: Product, cell: tuple[Index, ...], at: Value) -> tuple[Choice, Index]:
        named = [t for t in product.tests if isinstance(t, Is) and t.expert in cell and t.expert.terms]
        require(len(named) == 1 and isinstance(named[0].entry.atom, Element), NO_MASK, at)
        entry, expert = named[0].entry, named[0].expert
        total = renamed(product, {expert.atom: entry}.get)
        require(len(total) == 1, NO_MASK, at)
        (own,) = total
        placed = [t for t in own.tests if isinstance(t, At) and (t.index in cell or t.index == ZERO)]  # or one place
        require(len(placed) == 1 and not own.tallies, NO_MASK, at)
        rest = own.tests - set(placed)
        term = times(own.term, own.number)
        free = not any(mentions(parts_of(p), c) for c in cell if c.terms for p in (term, *rest, *placed[0].position))
        rest -= {Nonzero(factor) for factor in _factors(term)}  # a row that is weighted by 0 may be kept as well
        require(free and all(isinstance(t, (Below, Flag, Nonzero)) for t in rest), NO_MASK, at)
        return Choice(entry, term, placed[0].position, rest, _size(placed[0].index), placed[0].place), expert

    # ------------------------------------------------------------------------------- places of their own

    def _require_own_places(self, choices: list[Choice], product: Contraction) -> None:
        """No two rows have the same expert and position: positions count rows, later choices after earlier ones."""
        ranked = sorted((self._ranked(c, product) for c in choices), key=lambda r: len(r.totals))
        for number, later in enumerate(ranked):
            require(later.constant == ranked[0].constant, SHARED, product.value)
            if number == 0:
                require(not later.totals, SHARED, product.value)
                continue
            earlier = ranked[number - 1]
            new = later.totals - _earlier_totals(earlier, later)
            require(len(new) == 1 and len(later.totals) == number, SHARED, product.value)
            require(self._counts(next(iter(new)), earlier, later.choice), SHARED, product.value)

    def _ranked(self, choice: Choice, product: Contraction) -> _Ranked:
        tallies = [p for p in choice.position if p.tallies]
        plain = all(not p.tests and p.term == 1.0 for p in choice.position)
        single = all(p.number == 1.0 and len(p.tallies) == 1 for p in tallies)
        require(plain and single, SHARED, product.value)
        counts = {t for p in tallies for t in p.tallies}
        running = [t for t in counts if t.running]
        require(len(running) == 1 and self._counts_up(running[0], choice, product), SHARED, product.value)
        number = sum(p.number for p in choice.position if not p.tallies)
        require(number >= -1 and number % 1 == 0, "the first row of an expert has no place", product.value)
        return _Ranked(choice, running[0], frozenset(counts - set(running)), number)

    def _counts_up(self, tally: Tally, choice: Choice, product: Contraction) -> bool:
        """Whether the count grows with every row that has the choice: it counts each, and different ones elsewhere."""
        rows = [b for b in product.bound if b.terms]
        slots = [of_atom(a) for a in atoms(choice.ids) if isinstance(a, Var) and of_atom(a) in self.indicators.slots]
        column = [i for a, i in enumerate(tally.index) if a != tally.axis and i != choice.ids]
        if any(mentions(column, v) for v in (*rows, *slots)):
            return False
        orders = [*itertools.permutations((*rows, *slots))]
        orders += itertools.permutations(rows) if names_once(choice.element.value) or not slots else []
        position = tally.index[tally.axis]
        ahead = any(position == flatten(order, [_size(v) for v in order]) for order in orders)
        item = self._item(tally.source, tally.index)
        return ahead and item is not None and item <= choice.tests

    def _item(self, source: Value, index: tuple[Index, ...]) -> frozenset[Test] | None:
        """The tests of an entry that is 1 where they hold and 0 elsewhere."""
        total = self.indicators.of(source, index)
        if total is None or len(total) != 1:
            return None
        (product,) = total
        plain = product.number == 1.0 and product.term == 1.0 and not product.tallies
        return product.tests if plain else None

    def _counts(self, total: Tally, earlier: _Ranked, later: Choice) -> bool:
        """Whether a total is at least how many rows an earlier choice put with the later one's expert."""
        running = earlier.running
        if total.axis != running.axis or len(total.index) != len(running.index):
            return False
        columns = zip(_column(total), _column(running), strict=True)
        if not all((a == later.ids if b == earlier.choice.ids else a == b) for a, b in columns):
            return False
        counted, every = self._item(total.source, running.index), self._item(running.source, running.index)
        if counted is None or every is None or sizes_of(total.source) != sizes_of(running.source):
            return False
        more = counted - every
        own = all(isinstance(t, Below) and t.position == earlier.choice.position for t in more)
        return every <= counted and own and more <= earlier.choice.holding

    # ------------------------------------------------------------------------------- results

    def _kept(self, choice: Choice, at: Value) -> Kept:
        conditions = [_element(test) for test in choice.tests]
        if choice.holding != choice.tests:  # ``position == arange(C)`` holds for no place, and needs no comparison
            require(isinstance(choice.places, int), "the number of places is not static", at)
            conditions.append(Call(torch.lt, (Leaf(*choice.place), choice.places)))
        return Kept(choice.ids, choice.term, tuple(conditions))


def split_places(contribution: Contribution, notation: Notation) -> Contribution:
    """A sum over all places of all experts, [E * C], as one over experts and places."""
    for variable in contribution.bound:
        split = [a for i in contribution.index for a in atoms(i) if isinstance(a, Quotient) and a.index == variable]
        size = _size(variable)
        if split and isinstance(size, int) and isinstance(split[0].divisor, int) and size % split[0].divisor == 0:
            inner, outer = split[0].divisor, size // split[0].divisor
            expert, place = notation.variables.new(outer), notation.variables.new(inner)
            whole = add(scale(expert, inner), place)
            contribution = substituted(contribution, variable, whole)
            bound = (*contribution.bound, *(v for v in (expert, place) if v.terms))
            contribution = replace(contribution, bound=bound)
    return contribution


def _earlier_totals(earlier: _Ranked, later: _Ranked) -> frozenset[Tally]:
    """The totals that an earlier position starts from, for the expert of the later one."""
    mine, theirs = earlier.choice.ids, later.choice.ids
    return frozenset(replace(t, index=tuple(theirs if i == mine else i for i in t.index)) for t in earlier.totals)


def _reads(choice: Choice, dispatched: Choice) -> bool:
    """Whether a choice of the combination reads the place that this one of the dispatch fills with the token's row."""
    a, b = dispatched.element, choice.element
    if a.value is not b.value or len(a.index) != len(b.index):
        return False
    names = {
        i.atom: j for i, j in zip(a.index, b.index, strict=True)
        if i != j and isinstance(i.atom, Var) and isinstance(j.atom, Var) and i.atom.size == j.atom.size
    }  # fmt: skip
    same = dispatched.renamed(names.get)
    weighted = {Nonzero(factor) for factor in _factors(choice.term)}  # where it is not, nothing is added
    return same.ids == choice.ids and same.position == choice.position and same.tests <= choice.holding | weighted


def _factors(term: Any) -> list[Any]:
    """A term, and those that make it 0 where they are 0."""
    if not isinstance(term, Call):
        return [term]
    inner = term.arguments if term.function is torch.mul else term.arguments[:1]
    through = term.function in (torch.mul, torch.div, torch.Tensor.to)
    return [term, *(f for a in inner for f in _factors(a))] if through else [term]


def _element(test: Test) -> Any:
    """What must be true, as a term."""
    if isinstance(test, Flag):
        return Given(*test.place)
    assert isinstance(test, Below)
    leaf = Leaf(*test.place)
    return Call(torch.logical_not, (leaf,)) if test.negated else leaf


def _column(tally: Tally) -> list[Index]:
    return [i for axis, i in enumerate(tally.index) if axis != tally.axis]


def _order(choice: Choice) -> tuple[int, int, str]:
    """First choices first: they are made first, and their positions start from fewer totals."""
    totals = sum(1 for p in choice.position for t in p.tallies if not t.running)
    return totals, choice.element.value.position, str(choice.element.index[-1].number)


def _size(variable: Index) -> Size:
    return variable.atom.size if isinstance(variable.atom, Var) else 1
