"""Terms of routing weights, and scores: what a term is where a token goes to an expert, and elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import (
    Element,
    Index,
    Var,
    substitute,
)


@dataclass(frozen=True)
class Chosen:
    """The token goes to the expert: ``ids == expert`` for some value of the slot variables in ``ids``."""

    ids: Index
    expert: Index

    @property
    def element(self) -> Element:
        """The entry of the table of ids."""
        atom = self.ids.atom
        assert isinstance(atom, Element)
        return atom


@dataclass(frozen=True)
class Leaf:
    """An element that the rewrite takes as it is."""

    value: Value
    index: tuple[Index, ...]


@dataclass(frozen=True)
class Given(Leaf):
    """An element of a mask that has to do with neither ids nor weights, as far as is known."""


@dataclass(frozen=True)
class Call:
    """A function of terms and numbers; ``axis_k`` functions work along the k entries of a token."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()


Term = Leaf | Call | float


@dataclass(frozen=True)
class Score:
    """``term`` where ``chosen`` holds (always, if it is None), ``other`` elsewhere."""

    term: Term
    chosen: Chosen | None = None
    other: float = 0.0
    distinct: bool = False

    def map(self, function: Callable[..., Any], *rest: Any, keywords: tuple[tuple[str, Any], ...] = ()) -> Score | None:
        """An elementwise function of the score, with further arguments that are numbers."""
        other = _number(function, self.other, *rest, keywords=keywords) if self.chosen else 0.0
        if other is None:
            return None
        return replace(self, term=_applied(function, (self.term, *rest), keywords), other=other)


def combine(function: Callable[..., Any], left: Score | None, right: Score | None) -> Score | None:
    """A function of two scores whose conditions, if both have one, are the same."""
    if left is None or right is None:
        return None
    chosen, distinct = left.chosen or right.chosen, left.distinct or right.distinct
    if left.chosen is not None and right.chosen is not None:
        renamed = renaming(right.chosen, left.chosen)
        if renamed is None:
            return None
        right, distinct = substitute_score(right, renamed), True
    other: float | None = 0.0
    if chosen is not None:
        other = _other_of(function, left, right)
    if other is None:
        return None
    if function is torch.mul and 1.0 in (left.term, right.term):
        return Score(right.term if left.term == 1.0 else left.term, chosen, other, distinct)
    return Score(_applied(function, (left.term, right.term)), chosen, other, distinct)


def _other_of(function: Callable[..., Any], left: Score, right: Score) -> float | None:
    """The value elsewhere; 0 times anything is 0."""
    values = [s.other if s.chosen is not None else s.term for s in (left, right)]
    if all(isinstance(v, float) for v in values):
        return _number(function, *values)
    if function is torch.mul and 0.0 in values:
        return 0.0
    return 0.0 if function is torch.div and values[0] == 0.0 else None


def renaming(chosen: Chosen, like: Chosen) -> Callable[[Any], Index | None] | None:
    """How to rename the slot variable of ``chosen`` to that of ``like``; None if they say different things."""
    a, b = chosen.element, like.element
    if chosen.expert != like.expert or a.value is not b.value or len(a.index) != len(b.index):
        return None
    names: dict[Any, Index] = {}
    for i, j in zip(a.index, b.index, strict=True):
        if i == j:
            continue
        if not isinstance(i.atom, Var) or not isinstance(j.atom, Var) or i.atom.size != j.atom.size:
            return None
        names[i.atom] = j
    return names.get


def substitute_score(score: Score, replaced: Callable[[Any], Index | None]) -> Score:
    """A score with index atoms replaced."""
    chosen = score.chosen
    if chosen is not None:
        chosen = Chosen(substitute(chosen.ids, replaced), substitute(chosen.expert, replaced))
    return replace(score, term=substitute_term(score.term, replaced), chosen=chosen)


def substitute_term(term: Any, replaced: Callable[[Any], Index | None]) -> Any:
    """A term with index atoms replaced."""
    if isinstance(term, Leaf):
        return replace(term, index=tuple(substitute(i, replaced) for i in term.index))
    if isinstance(term, Call):
        return replace(term, arguments=tuple(substitute_term(a, replaced) for a in term.arguments))
    return term


def negated(score: Score | None) -> Score | None:
    """A mask the other way round; None for what is no mask."""
    if score is None or not isinstance(score.term, float) or score.chosen is None:
        return None
    return replace(score, term=1.0 - score.term, other=1.0 - score.other)


def times(term: Any, scale: float) -> Any:
    """A term times a number."""
    if scale == 1.0:
        return term
    return Call(torch.mul, (term, scale)) if term != 1.0 else scale


def _applied(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Any = ()) -> Term:
    if all(isinstance(a, (int, float, torch.dtype)) for a in arguments):
        found = _number(function, *arguments, keywords=keywords)
        if found is not None:
            return found
    return Call(function, arguments, tuple(keywords))


def _number(function: Callable[..., Any], *arguments: Any, keywords: Any = ()) -> float | None:
    tensors = [torch.tensor(a, dtype=torch.float64) if isinstance(a, float) else a for a in arguments]
    result = float(function(*tensors, **dict(keywords)))
    return None if math.isnan(result) else result
