"""Runs of rows that belong to one expert: offsets, sizes, and the expert of a row."""

from __future__ import annotations

from dataclasses import replace

import torch

from samoyeds_compile.graph.ops import ZEROS
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import Element, Index, Rank, Size, Sorted, of_atom, sizes_of, substitute
from samoyeds_compile.match.notation.notation import Notation

_INEXACT = (torch.bfloat16, torch.float16)
"""Dtypes that do not hold every id or count."""


def expert_of_row(ends: Value, cumulative: bool, row: Index, experts: Size, notation: Notation) -> Index | None:
    """The expert whose run of rows holds ``row``, where the rows are sorted by expert.

    Args:
        ends: [E]; where each run ends if ``cumulative``, else how long each is.
        cumulative: see there.
        row: a position among the sorted rows.
        experts: E.
        notation: of the graph.
    """
    atom = row.atom
    if not isinstance(atom, Rank):
        return None
    sizes = _differences(ends) if cumulative else ends
    return None if sizes is None else expert_of_rank(atom, sizes, experts, notation)


def expert_of_rank(rank: Rank, sizes: Value, experts: Size, notation: Notation) -> Index | None:
    """The expert whose run holds a sorted row, if ``sizes`` [E] are the lengths of the runs of the ids sorted."""
    sort = rank.permutation.input if rank.permutation.op == "item" else rank.permutation
    if not counts_experts(sizes, sort.input, experts, notation):
        return None
    entry = notation.integer(sort.input, (rank.index,))
    element = entry.atom
    if (
        not _counts_one_more(sizes, experts)
        or not isinstance(element, Element)
        or chosen_from(element.value) == experts
    ):
        return entry
    return of_atom(replace(element, most=experts - 1))


def names_once(ids: Value) -> bool:
    """Whether the ids of a token are known to differ: they are indices of a top-k, or there is one."""
    if len(ids.shape) <= 1 or sizes_of(ids)[-1] == 1:
        return True
    chosen = ids.op == "item" and ids.input.op in ("topk", "sort") and ids.arg("key") == 1
    return chosen and ids.input.arg("dim", -1) in (-1, len(ids.shape) - 1)


def _counts_one_more(sizes: Value, experts: Size) -> bool:
    """Whether a histogram counts the id E as expert E - 1: its last bin is closed on both sides."""
    histogram = strip_casts(sizes)
    return histogram.op == "histc" and histogram.arg("max") == experts


def chosen_from(ids: Value) -> int | None:
    """How many experts a router chooses from, if the ids come from one."""
    choice = ids.input if ids.op == "item" else ids
    known = choice.op in ("topk", "argmax", "max", "sort", "argsort") and isinstance(choice.input, Value)
    axis = choice.arg("dim", -1)
    width = sizes_of(choice.input)[axis] if known and isinstance(axis, int) else None
    return width if isinstance(width, int) else None


def _differences(offsets: Value) -> Value | None:
    """The sizes whose inclusive running sum the offsets are."""
    offsets = strip_casts(offsets)
    if offsets.op != "cumsum" or offsets.arg("dim") not in (0, -1):
        return None
    return offsets.input  # type: ignore[no-any-return]


def counts_experts(sizes: Value, ids: Value, experts: Size, notation: Notation) -> bool:
    """Whether ``sizes[e]`` is how often e stands in the vector ``ids``, in any order, for e = 0 .. E-1."""
    counted = _counted(strip_casts(sizes), experts)
    if counted is None:
        return False
    row = notation.variables.new(sizes_of(ids)[0])
    index = (row,) if len(counted.shape) == 1 else notation.index_of(counted)
    seen = notation.integer(counted, index)
    wanted = notation.integer(ids, (row,) if len(counted.shape) == 1 else (notation.flat(counted, index),))

    def unsorted(atom: object) -> Index | None:
        if isinstance(atom, Sorted) and of_atom(atom) != row and atom.index == row:
            return row
        return None

    return substitute(seen, unsorted) == substitute(wanted, unsorted)


def _counted(sizes: Value, experts: Size) -> Value | None:
    """The ids that a histogram counts."""
    if sizes.op == "histc":
        bounds = (sizes.arg("bins"), sizes.arg("min"), sizes.arg("max"))
        # One bin an id: E bins over [0, E-1] or [0, E] both put id e < E into bin e.
        exact = bounds in ((experts, 0, experts - 1), (experts, 0, experts))
        return strip_casts(sizes.input) if exact else None
    if sizes.op == "bincount" and sizes.arg("weights", sizes.arg("1")) is None:
        return strip_casts(sizes.input) if sizes.arg("minlength", sizes.arg("2")) == experts else None
    if sizes.op == "sum":
        return _summed_one_hot(sizes, experts)
    return None


def _summed_one_hot(sizes: Value, experts: Size) -> Value | None:
    """``one_hot(ids, E).sum(over all but the last axis)`` and ``(ids.unsqueeze(-1) == arange(E)).sum(...)``."""
    hot = strip_casts(sizes.input)
    axes = sizes.arg("dim")
    summed = {a % len(hot.shape) for a in (axes if isinstance(axes, tuple) else (axes,)) if isinstance(a, int)}
    if summed != set(range(len(hot.shape) - 1)) or sizes.arg("keepdim", False):
        return None
    if hot.op == "scatter" and _marks_ids(hot, experts):
        return hot.arg("index")  # type: ignore[no-any-return]
    if hot.op == "one_hot" and sizes_of(hot)[-1] == experts:
        return hot.input  # type: ignore[no-any-return]
    if hot.op == "eq" and hot.input.op == "unsqueeze" and hot.input.arg("dim") in (-1, len(hot.shape) - 1):
        numbers = hot.arg("other")
        counts = isinstance(numbers, Value) and numbers.op == "arange" and numbers.arg("start") == 0
        return hot.input.input if counts and sizes_of(numbers)[0] == experts else None
    return None


def _marks_ids(table: Value, experts: Size) -> bool:
    """``zeros(T, E).scatter(1, ids, 1)`` with ids that differ within a row."""
    ids, base = table.arg("index"), strip_casts(table.input)
    ones = table.arg("src", table.arg("value")) == 1 and table.arg("dim") in (1, -1) and table.arg("reduce") is None
    distinct = isinstance(ids, Value) and names_once(ids)
    zeros = base.op in ZEROS
    return bool(ones and distinct and zeros and sizes_of(table)[-1] == experts)


def strip_casts(value: Value) -> Value:
    """The value before casts that keep small whole numbers as they are."""
    while value.op in ("to", "type_as") and isinstance(value.input, Value) and value.dtype not in _INEXACT:
        value = value.input
    return value
