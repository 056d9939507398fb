"""What must hold for a contribution to count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import (
    Index,
    substitute,
)


@dataclass(frozen=True)
class Mask:
    """An entry of a boolean tensor that must be true (or false) for a contribution to count."""

    value: Value
    index: tuple[Index, ...]
    wanted: bool = True


@dataclass(frozen=True)
class Equal:
    """Two indices that must be equal for a contribution to count."""

    left: Index
    right: Index


Condition = Mask | Equal


def substitute_condition(condition: Condition, replaced: Any) -> Condition:
    """A condition with atoms replaced."""
    if isinstance(condition, Mask):
        return replace(condition, index=tuple(substitute(i, replaced) for i in condition.index))
    return Equal(substitute(condition.left, replaced), substitute(condition.right, replaced))
