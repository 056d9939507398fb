"""Which rows are added to a token: all r with ``chosen[r] == t``, and how a split of sorted rows belongs to experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.conditions import Condition, Equal, Mask, substitute_condition
from samoyeds_compile.match.notation.index import (
    Coordinate,
    Count,
    Index,
    Piece,
    Quotient,
    Rank,
    Remainder,
    Size,
    Sorted,
    Start,
    add,
    atoms,
    constant,
    of_atom,
    rank_of,
    scale,
    sizes_of,
    substitute,
)
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.reindex import Place
from samoyeds_compile.match.notation.segments import expert_of_rank
from samoyeds_compile.match.region import require


@dataclass(frozen=True)
class Rows:
    """Rows in terms of the variables that enumerate them."""

    row: Index
    bound: tuple[Index, ...]
    conditions: tuple[Condition, ...] = ()

    def substituted(self, variable: Index, by: Index, fresh: tuple[Index, ...] = ()) -> Rows:
        """With a variable replaced by an index of ``fresh`` ones."""
        replaced = {variable.atom: by}.get
        bound = tuple(b for b in self.bound if b != variable and b.terms) + tuple(f for f in fresh if f.terms)
        conditions = tuple(substitute_condition(c, replaced) for c in self.conditions)
        return Rows(substitute(self.row, replaced), bound, conditions)


def rows_at(chosen: Value, target: tuple[Index, ...], notation: Notation) -> Rows:
    """All r with ``chosen[r, ...] == target[0]``."""
    row = notation.variables.new(sizes_of(chosen)[0])
    index = (row, *target[1:])[: len(chosen.shape)]
    seen = notation.integer(chosen, index)
    space = _row_space(seen if seen.terms else _source(chosen, index, notation), row, notation)
    seen = substitute(seen, {row.atom: space.row}.get)
    solution = _equate(seen, target[0], space, notation)
    require(solution is not None, "rows are added to places that are not understood", chosen)
    assert solution is not None
    return solution


def _source(chosen: Value, index: tuple[Index, ...], notation: Notation) -> Index:
    """What a place is computed from: with a single token ``order // K`` is 0, but the rows are in ``order``."""
    *_, (value, place) = notation.places(chosen, index)
    while value.op in ("floor_divide", "div", "to") and value.input.shape == value.shape:
        *_, (value, place) = notation.places(value.input, place)
    return notation.integer(value, place)


def _row_space(seen: Index, row: Index, notation: Notation) -> Rows:
    """What row ``row`` of gathered rows is, by how the index mentions it."""
    for atom in atoms(seen):
        if isinstance(atom, Sorted) and atom.index == row:
            flat = notation.variables.new(sizes_of(atom.permutation)[0])
            return Rows(rank_of(atom.permutation, flat), (flat,))
        if isinstance(atom, Coordinate) and atom.index == row:
            axes = notation.index_of(atom.mask)
            return Rows(of_atom(Count(atom.mask, axes)), axes, (Mask(atom.mask, axes),))
        if isinstance(atom, Sorted) and any(isinstance(a, Start) for a in atoms(atom.index)):
            return _piece_space(atom, row, notation)
    return Rows(row, (row,))


def _piece_space(atom: Sorted, row: Index, notation: Notation) -> Rows:
    start = next(a for a in atoms(atom.index) if isinstance(a, Start))
    require(atom.index == add(row, of_atom(start)), "rows of a split are not understood", atom.permutation)
    flat = notation.variables.new(sizes_of(atom.permutation)[0])
    position = rank_of(atom.permutation, flat)
    condition = Equal(expert_in_split(start.split, position, notation), constant(start.number))
    return Rows(of_atom(Piece(start.split, start.number, position)), (flat,), (condition,))


def expert_in_split(split: Value, position: Index, notation: Notation) -> Index:
    """The number of the piece in which a sorted row lies: its expert, if the sizes count the experts."""
    sizes = split_sizes(split, notation)
    rank = position.atom
    require(sizes is not None and isinstance(rank, Rank), "the sizes of a split do not count experts", split)
    assert sizes is not None and isinstance(rank, Rank)
    expert = expert_of_rank(rank, *sizes, notation)
    require(expert, "the sizes of a split do not count the expert ids that were sorted", split)
    assert expert is not None
    return expert


def _equate(seen: Index, target: Index, space: Rows, notation: Notation) -> Rows | None:
    """``space`` narrowed to the rows for which ``seen`` is ``target``."""
    if seen == target and not seen.terms:  # the axis has one entry
        return Rows(space.row, tuple(b for b in space.bound if b.terms), space.conditions)
    for variable in space.bound:
        if seen == variable:
            return space.substituted(variable, target)
        sizes: Size = variable.atom.size if variable.terms else 1  # type: ignore[union-attr]
        for atom in atoms(seen):
            if seen != of_atom(atom):
                continue
            if isinstance(atom, Quotient) and atom.index == variable and isinstance(atom.divisor, int):
                k = notation.variables.new(atom.divisor)
                return space.substituted(variable, add(scale(target, atom.divisor), k), (k,))
            if isinstance(atom, Remainder) and atom.index == variable:
                k = notation.variables.new(sizes // atom.divisor)
                return space.substituted(variable, add(scale(k, atom.divisor), target), (k,))
    return None


def split_sizes(split: Value, notation: Notation) -> tuple[Value, Size] | None:
    """(the vector whose entries are the sizes of a split, its length)."""
    sizes = split.arg("split_size")
    if not isinstance(sizes, tuple):
        return None
    source: Value | None = None
    for number, size in enumerate(sizes):
        place = entry_read(size, notation)
        if place is None or place[1] != (constant(number),) or source not in (None, place[0]):
            return None
        source = place[0]
    return None if source is None or sizes_of(source)[0] != len(sizes) else (source, len(sizes))


def entry_read(size: Any, notation: Notation) -> Place | None:
    """The entry of an integer tensor that ``tensor[i].item()`` reads."""
    if not isinstance(size, Value) or size.op != "item" or size.arg("key") is not None:
        return None
    value, index = size.input, tuple(constant(0) for _ in size.input.shape)
    while True:
        *_, (value, index) = notation.places(value, index)
        if value.op not in ("to", "type_as") or not isinstance(value.input, Value):
            return notation.canon(value), index
        value = value.input
