"""The branches of one output, put together: all experts of a choice, and all choices of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.batched import require_alike
from samoyeds_compile.match.notation.branch import Branch
from samoyeds_compile.match.notation.experts import ExpertFunction
from samoyeds_compile.match.notation.index import Index, Size, sizes_of, substitute
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.segments import chosen_from
from samoyeds_compile.match.notation.terms import Call, Leaf, Score, substitute_score
from samoyeds_compile.match.region import require

Choice = list[Branch]
"""One branch for all experts, or one for each of 0 .. E-1, all with the same ids."""


def choices_of(branches: list[Branch], notation: Notation) -> list[Choice]:
    """The choices of a token: most often one, with K slots.

    Raises:
        Decline: an expert is left out or used twice, or experts differ in more than their weights.
    """
    choices = _by_ids(_over_slots(branches, notation))
    for choice in choices:
        _require_every_expert(choice)
    for other in choices[1:]:
        _require_same_experts(choices[0], other)
    return choices


def _by_ids(branches: list[Branch]) -> list[Choice]:
    """Branches by the ids that name their experts."""
    choices: list[Choice] = []
    for branch in branches:
        alike = next((c for c in choices if _slot_renaming(branch, c[0]) is not None), None)
        if alike is None:
            choices.append([branch])
        else:
            alike.append(branch)
    return choices


def _over_slots(branches: list[Branch], notation: Notation) -> list[Branch]:
    """Branches of single slots, one for each of 0 .. K-1, as one over all slots."""
    numbers = [_slot_number(b) for b in branches]
    if None in numbers or any(b.conditions for b in branches):
        return branches
    top_k = sizes_of(branches[0].element.value)[-1]
    slot = notation.variables.new(top_k)
    by_expert: dict[int | None, list[Branch]] = {}
    for branch, number in zip(branches, numbers, strict=True):
        by_expert.setdefault(branch.expert, []).append(_generalised(branch, number, top_k, slot))
    for alike in by_expert.values():
        every = len(alike) == top_k and set(numbers) == set(range(top_k))
        require(every, "not every slot of a token goes to an expert", alike[0].function.down.product)
        for other in alike[1:]:
            _require_same(alike[0], other)
    return [alike[0] for alike in by_expert.values()]


def _require_every_expert(choice: Choice) -> None:
    """One branch for all experts, or one for each of 0 .. E-1, with the same function."""
    first, at = choice[0], choice[-1].function.down.product
    if first.expert is None:
        require(len(choice) == 1, "several sums over experts end in one output", at)
        return
    numbers = [b.expert for b in choice]
    require(None not in numbers, "some experts are unrolled and others are not", at)
    missing = sorted(set(range(_count_experts(choice))) - {n for n in numbers if n is not None})
    require(not missing, f"no tokens go to expert {missing[:1]}" if missing else "", at)
    require(len(set(numbers)) == len(numbers), "an expert is used twice", at)
    for branch in choice[1:]:
        _require_same(first, branch)


def _require_same_experts(first: Choice, other: Choice) -> None:
    """Two choices of a token are of the same experts."""
    at = other[0].function.down.product
    by_number = {b.expert: b.function for b in first}
    require(by_number.keys() == {b.expert for b in other}, "several sums over experts end in one output", at)
    for branch in other:
        same = _identity(by_number[branch.expert]) == _identity(branch.function)
        require(same, "several sums over experts end in one output", at)
        require_alike(by_number[branch.expert], branch.function)


def _identity(function: ExpertFunction) -> list[Any]:
    """The tensors that a function is made with."""
    weights: list[Value | None] = [function.x[0]]
    for p in function.projections:
        weights += [p.weight.value, None if p.bias is None else p.bias.value]
    return weights


def _count_experts(choice: Choice) -> Size:
    """E: the size of the stack, or how many the router chooses from; at least all up to the highest one used."""
    stacked = choice[0].function.down.weight
    if stacked.expert is not None:
        return sizes_of(stacked.value)[0]
    highest = max(b.expert or 0 for b in choice) + 1
    return max(highest, len(choice), chosen_from(choice[0].element.value) or 0)


def _require_same(first: Branch, other: Branch) -> None:
    a, b = first.function, other.function
    at = b.down.product
    require_alike(a, b)
    require(a.x[0] is b.x[0], "experts have different inputs", at)
    renamed = _slot_renaming(other, first)
    require(renamed is not None, "experts are chosen by different ids", at)
    assert renamed is not None
    for mine, theirs in zip(_terms(first), _terms(other), strict=True):
        wanted = _at_expert(mine, first)
        given = substitute_score(Score(_at_expert(theirs, other)), renamed).term
        require(wanted == given, "experts have different routing weights", at)


def _terms(branch: Branch) -> Sequence[Any]:
    return (branch.weight, branch.input_weight, *branch.conditions)


def _slot_number(branch: Branch) -> int | None:
    """The slot of a branch that is for one slot of several only."""
    element = branch.element
    several = len(element.index) >= 2 and sizes_of(element.value)[-1] != 1
    return element.index[-1].number if several else None


def _generalised(branch: Branch, number: int | None, top_k: int, slot: Index) -> Branch:
    """A branch of slot ``number`` as one of slot ``slot``."""

    def term_of(term: Any) -> Any:
        if isinstance(term, Leaf) and sizes_of(term.value)[-1] == top_k and term.index[-1].number == number:
            return Leaf(term.value, (*term.index[:-1], slot))
        if isinstance(term, Call):
            return replace(term, arguments=tuple(term_of(a) for a in term.arguments))
        return term

    element = branch.element
    ids = Index(0, frozenset(((replace(element, index=(*element.index[:-1], slot)), 1),)))
    weights = {"weight": term_of(branch.weight), "input_weight": term_of(branch.input_weight)}
    return replace(branch, ids=ids, slot=slot, **weights)


def _slot_renaming(branch: Branch, like: Branch) -> Any:
    a, b = branch.element, like.element
    if a.value is not b.value or a.most != b.most or len(a.index) != len(b.index):
        return None
    names: dict[Any, Index] = {}
    if branch.slot != like.slot:
        names[branch.slot.atom] = like.slot
    renamed = tuple(substitute(i, names.get) for i in a.index)
    return names.get if renamed == b.index else None


def _at_expert(term: Any, branch: Branch) -> Any:
    """A term with the expert's own number replaced by a mark, so that terms of different experts compare."""
    if isinstance(term, Leaf):
        last = term.index[-1].number if term.index else None
        if last is not None and last == branch.expert and sizes_of(term.value)[-1] != 1:
            return Leaf(term.value, (*term.index[:-1], Index(-1)))
        return term
    if isinstance(term, Call):
        return replace(term, arguments=tuple(_at_expert(a, branch) for a in term.arguments))
    return term
