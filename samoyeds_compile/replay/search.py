"""Settle what the sizes of a replay stand for, where their numbers alone do not tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from samoyeds_compile.graph.sizes import Size
from samoyeds_compile.replay.numbers import Numbers

MOST_ATTEMPTS = 64

Assignment = Mapping[Size, int]
Attempt = Callable[[Assignment], "int | None"]


def settle(sizes: Mapping[Size, int], numbers: Numbers, attempt: Attempt) -> Assignment | None:
    """Try the choices of every ambiguous size until ``attempt`` is content; likeliest first, giving up early.

    Args:
        sizes: each size, with the step that is the first to have it.
        numbers: gives the choices.
        attempt: tries an assignment; returns None if it is content, else the step at which it saw that it is not.

    Returns:
        The assignment found, or None.
    """
    choices = {size: numbers.choices(size) for size in sizes}
    open_ = sorted((s for s in sizes if len(choices[s]) > 1), key=lambda s: sizes[s])
    taken = dict.fromkeys(open_, 0)
    for _ in range(MOST_ATTEMPTS):
        assignment = {size: options[taken.get(size, 0)] for size, options in choices.items()}
        failed = attempt(assignment)
        if failed is None:
            return assignment
        if not _advance(open_, taken, choices, {s for s in open_ if sizes[s] <= failed}):
            return None
    return None


def _advance(
    order: list[Size], taken: dict[Size, int], choices: Mapping[Size, tuple[int, ...]], reached: set[Size]
) -> bool:
    """The next choice of the last size that may be to blame, and the first choice of those after it."""
    for at in range(len(order) - 1, -1, -1):
        size = order[at]
        if size in reached and taken[size] + 1 < len(choices[size]):
            taken[size] += 1
            taken.update(dict.fromkeys(order[at + 1 :], 0))
            return True
    return False
