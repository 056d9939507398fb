"""One contribution to a block's output, fully read: which expert, computing what, for which tokens, at what weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.capacity import Capacity, split_places
from samoyeds_compile.match.notation.conditions import Condition, Equal
from samoyeds_compile.match.notation.contributions import Contribution
from samoyeds_compile.match.notation.experts import ExpertFunction, ExpertReader, token_row
from samoyeds_compile.match.notation.index import Element, Index, Size, Var, atoms, mentions, sizes_of
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Products
from samoyeds_compile.match.notation.projections import is_parameter
from samoyeds_compile.match.notation.reindex import Place
from samoyeds_compile.match.notation.scores import Scores
from samoyeds_compile.match.notation.terms import Chosen, Score, combine, negated, substitute_score, times
from samoyeds_compile.match.region import require


@dataclass(frozen=True)
class Branch:
    """What an expert, or all of them, contribute to a token.

    Attributes:
        ids: the entry of the ids that names the expert.
        expert: its number; None for a branch that stands for all experts.
        function: what it computes.
        weight: the routing weight after the expert, a term.
        input_weight: the routing weight before it, a term.
        slot: the variable in ``ids`` that counts the experts of a token.
        distinct: that an expert is named once by a token was relied on.
        dtypes: dtypes that the rows and sums have on the way to the output.
        conditions: terms that must be true for it to count, beside ``ids`` naming the expert.
        places: how many rows an expert takes, if there is a limit.
    """

    ids: Index
    expert: int | None
    function: ExpertFunction
    weight: Any
    input_weight: Any
    slot: Index
    distinct: bool
    dtypes: frozenset[torch.dtype]
    conditions: tuple[Any, ...] = ()
    places: Size | None = None

    @property
    def element(self) -> Element:
        """The entry of the ids."""
        assert isinstance(self.ids.atom, Element)
        return self.ids.atom


class BranchReader:
    """Reads the contributions to one output.

    Args:
        notation, products: of the graph.
        index: of the output's element.
        sizes: of the output.
        tokens: flat index of the token.
        count: how many tokens there are.

    Attributes:
        looks_like_a_block: something was read that ordinary layers do not have.
    """

    def __init__(
        self,
        notation: Notation,
        products: Products,
        index: tuple[Index, ...],
        sizes: tuple[Size, ...],
        tokens: Index,
        count: Size,
    ) -> None:
        self.notation, self.products = notation, products
        self.index, self.sizes, self.tokens = index, sizes, tokens
        self.is_row = token_row(tokens, count, sizes[-1])
        self.looks_like_a_block = False
        self._conditions: dict[tuple[tuple[Index, ...], ...], _Conditions] = {}  # by slots and experts

    def read(self, contribution: Contribution) -> list[Branch]:
        """The branches that make up a contribution: one, or one for each choice of a dispatch into places.

        Raises:
            Decline: the contribution is not that of an expert to the tokens that chose it.
        """
        _require_no_rounding(contribution)
        contribution = split_places(contribution, self.notation)
        reader = ExpertReader(self.notation, self.products, contribution, self.index[-1], self.sizes[:-1])
        self.looks_like_a_block |= bool(contribution.conditions)
        function = reader.read(self._is_source)
        self.looks_like_a_block |= function.expert is not None
        if self.products.is_product(function.x[0]) and not self.is_row(*function.x, function.up.inner):
            return self._dispatched(contribution, function)
        return [self._chosen(contribution, function)]

    def _is_source(self, value: Value, index: tuple[Index, ...], inner: Index) -> bool:
        """Whether an element is the token's row, or one of dispatched rows."""
        if self.is_row(value, index, inner):
            return True
        product = self.products.of(value, index) if self.products.is_product(value) else None
        if product is None or len(product.operands) != 2:
            return False
        masks = [p[0] for p in product.operands if not mentions(p[1], inner)]
        return len(masks) == 1 and not is_parameter(masks[0])

    # ------------------------------------------------------------------------------- rows of the tokens that chose

    def _chosen(self, contribution: Contribution, function: ExpertFunction) -> Branch:
        expert = function.expert
        experts = [expert] if expert is not None and isinstance(expert.atom, Var) else []
        slots = [b for b in contribution.bound if b not in experts]
        variables = tuple(slots), tuple(experts)
        known = self._conditions.get(variables)
        if known is None:
            known = self._conditions[variables] = _Conditions(Scores(self.notation, self.index[:-1], slots, experts))
        scores = known.scores
        weight = _conjunction([known.score(c) for c in contribution.conditions], contribution)
        weight = _times(weight, [scores.of(*f) for f in contribution.factors], contribution)
        scaled = _times(Score(1.0), [scores.of(*f) for f in function.inputs], contribution)
        self.looks_like_a_block |= weight.chosen is not None
        weight, scaled = _outside(weight, scaled, function, contribution)
        return self._named(contribution, function, weight, scaled)

    def _named(self, contribution: Contribution, function: ExpertFunction, weight: Score, scaled: Score) -> Branch:
        """The branch with its expert: a number, or the entry of the ids."""
        expert, chosen = function.expert, weight.chosen
        number = chosen.expert.number if chosen is not None else None
        if number is None:
            one = set(function.experts) == {expert}
            require(one, "the projections of a row belong to different experts", contribution.value)
        require(chosen is None or weight.other == 0.0, "experts that are not chosen contribute", contribution.value)
        if chosen is None:
            require(expert is not None and isinstance(expert.atom, Element),
                    "nothing says which tokens an expert is for", contribution.value)  # fmt: skip
            assert expert is not None
            return self._branch(contribution, function, weight, scaled, expert, None, None)
        if expert is not None and isinstance(expert.atom, Var):
            require(chosen.expert == expert, "the weights are those of another expert", contribution.value)
            return self._branch(contribution, function, weight, scaled, chosen.ids, None, expert)
        require(number is not None, "the expert of a row is not known", contribution.value)
        own = all(e is None or e.number == number for e in function.experts)
        require(own, "the weights are those of another expert", contribution.value)
        return self._branch(contribution, function, weight, scaled, chosen.ids, number, None)

    def _branch(
        self, c: Contribution, function: ExpertFunction, weight: Score, scaled: Score, ids: Index,
        number: int | None, expert: Index | None,
    ) -> Branch:  # fmt: skip
        slot = self._slot(ids)
        free = [b for b in c.bound if b not in (slot, expert)]
        require(not free, "a sum runs over something other than slots and experts", c.value)
        by_expert: dict[Any, Index] = {}
        if expert is not None:
            by_expert[expert.atom] = ids
        after, before = (substitute_score(replace(s, chosen=None), by_expert.get).term for s in (weight, scaled))
        return Branch(
            ids, number, function, times(after, c.scale), times(before, function.scale), slot,
            c.distinct or weight.distinct or scaled.distinct, c.dtypes,
        )  # fmt: skip

    def _slot(self, ids: Index) -> Index:
        """The variable that counts the experts of a token."""
        element = ids.atom
        assert isinstance(element, Element)
        own = {a for i in self.index for a in atoms(i)}
        slots = {a for i in element.index for a in atoms(i) if isinstance(a, Var) and a not in own}
        require(len(slots) <= 1, "the expert ids are no table [T, K]", element.value)
        return Index(0, frozenset((slot, 1) for slot in slots))

    # ------------------------------------------------------------------------------- rows in places of their own

    def _dispatched(self, contribution: Contribution, function: ExpertFunction) -> list[Branch]:
        at = contribution.value
        require(not function.inputs and function.scale == 1.0, "the rows are weighed on the way in", at)
        capacity = Capacity(self.notation, self.products, self.tokens, contribution)
        expert, number = _number(contribution)
        found = capacity.read(_at_any(function.x, expert, number), function.up.inner)
        require(self.is_row(*found.x, function.up.inner), "the rows dispatched are not those of the output", at)
        require(number is None or expert == found.expert, "the weights are those of another expert", at)
        if number is None:
            require(set(function.experts) == {found.expert}, "the weights are those of another expert", at)
        else:
            own = all(e is None or e == found.expert or e.number == number for e in function.experts)
            require(own, "the weights are those of another expert", at)
        function = replace(function, x=found.x)
        return [
            Branch(
                kept.ids, number, function, times(kept.term, contribution.scale), 1.0, self._slot(kept.ids), False,
                contribution.dtypes, kept.conditions, found.places,
            )
            for kept in found.kept
        ]  # fmt: skip


def _number(contribution: Contribution) -> tuple[Index, int | None]:
    """(variable, number) of the expert that a contribution is for, if it is for one only."""
    found = set()
    for condition in contribution.conditions:
        by_number = isinstance(condition, Equal) and condition.right.number is not None
        require(by_number, "the rows are masked", contribution.value)
        assert isinstance(condition, Equal)
        found.add((condition.left, condition.right.number))
    require(len(found) <= 1, "the rows are masked", contribution.value)
    return next(iter(found), (Index(), None))


def _at_any(place: Place, expert: Index, number: int | None) -> Place:
    """A place of one expert as that of any, where every expert has a part of a tensor of its own."""
    if number is None:
        return place
    value, index = place
    size = expert.atom.size if isinstance(expert.atom, Var) else None
    axes = [a for a, n in enumerate(sizes_of(value)) if n == size and index[a].number == number]
    require(len(axes) == 1, "nothing says which rows an expert is for", value)
    return value, tuple(expert if a == axes[0] else i for a, i in enumerate(index))


def _require_no_rounding(contribution: Contribution) -> None:
    """Rows are summed in the dtype of the products or a wider one."""
    own = contribution.value.dtype
    assert own is not None
    for dtype in contribution.dtypes:
        wide = torch.promote_types(dtype, own) == dtype
        require(wide, f"rows are rounded to {dtype} on the way to the output", contribution.value)


class _Conditions:
    """Scores of conditions, each mask's once: rows written by mask are excluded by the masks of all later experts."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores
        self._of: dict[tuple[Value, tuple[Index, ...]], Score | None] = {}

    def score(self, condition: Condition) -> Score | None:
        """The condition as a score that is 1 where it holds; None for what is not understood."""
        if isinstance(condition, Equal):
            for ids, expert in ((condition.left, condition.right), (condition.right, condition.left)):
                if isinstance(ids.atom, Element):
                    return Score(1.0, Chosen(ids, expert))
            return None
        place = condition.value, condition.index
        if place not in self._of:
            found = self.scores.of(*place)
            test = found is not None and found.chosen is not None and {found.term, found.other} == {0.0, 1.0}
            self._of[place] = found if test else None
        known = self._of[place]
        return known if condition.wanted else negated(known)


def _conjunction(conditions: Sequence[Score | None], contribution: Contribution) -> Score:
    """All conditions as one; those that exclude other experts say nothing new."""
    require(None not in conditions, "a mask does not say which expert a token goes to", contribution.value)
    known = [c for c in conditions if c is not None]
    positive = [c for c in known if c.term == 1.0]
    total = _times(Score(1.0), positive, contribution)
    for excluded in (c for c in known if c.term == 0.0):
        assert excluded.chosen is not None
        differs = total.chosen is not None and _differ(total.chosen, excluded.chosen)
        require(differs, "a mask excludes an expert that it should not", contribution.value)
    return total


def _times(total: Score, factors: Sequence[Score | None], contribution: Contribution) -> Score:
    for factor in factors:
        combined = combine(torch.mul, total, factor)
        require(combined is not None, "a factor of the experts' rows is no routing weight", contribution.value)
        assert combined is not None
        total = combined
    return total


def _outside(weight: Score, scaled: Score, function: ExpertFunction, contribution: Contribution) -> tuple[Score, Score]:
    """A scale on the way in that is 0 for experts not chosen leaves them out, if 0 goes to 0."""
    if scaled.chosen is None:
        return weight, scaled
    zero = scaled.other == 0.0 and not any(p.bias for p in function.projections) and maps_zero_to_zero(function)
    require(zero, "experts that are not chosen still contribute, as 0 does not go to 0 in them", contribution.value)
    return _times(weight, [replace(scaled, term=1.0)], contribution), replace(scaled, chosen=None)


def maps_zero_to_zero(function: ExpertFunction) -> bool:
    """Whether an expert without biases maps a row of zeros to zeros."""
    from samoyeds_codegen import expr

    zero = torch.zeros(1, dtype=torch.float64)
    names = (expr.PLAIN_NAME, *expr.GATED_NAMES)
    return bool((expr.evaluate(function.activation, dict.fromkeys(names, zero)) == 0).all())


def _differ(a: Chosen, b: Chosen) -> bool:
    """Whether two conditions name different experts of the same entry."""
    return a.ids == b.ids and a.expert.number is not None and b.expert.number not in (None, a.expert.number)
