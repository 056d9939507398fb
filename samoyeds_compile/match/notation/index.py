"""Integer index expressions in a canonical form: a constant plus a sum of coefficient times atom.

``t * K + k``, ``ids[t, k]`` and ``perm[s] // K`` are such expressions. Two expressions that mean the same mostly are
equal objects, because every constructor simplifies: ``(t * K + k) // K`` is ``t``, ``perm[inverse(q)]`` is ``q``.
Sizes and coefficients are numbers or sympy expressions (dynamic shapes); no guard is ever added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from samoyeds_compile.graph.values import Value

Size = Any
"""An int or a sympy expression."""


@dataclass(frozen=True)
class Var:
    """A free or bound index variable that runs from 0 to ``size - 1``."""

    number: int
    size: Size


@dataclass(frozen=True)
class Element:
    """Entry ``index`` of an integer tensor, such as ``ids[t, k]``, but no more than ``most`` if that is given."""

    value: Value
    index: tuple[Index, ...]
    most: Size | None = None


@dataclass(frozen=True)
class Sorted:
    """``permutation[index]``: which flat position stands at ``index`` after sorting."""

    permutation: Value
    index: Index


@dataclass(frozen=True)
class Rank:
    """Inverse of `Sorted`: where flat position ``index`` stands after sorting."""

    permutation: Value
    index: Index


@dataclass(frozen=True)
class Coordinate:
    """Coordinate ``axis`` of the entry number ``index`` among the true entries of a mask."""

    mask: Value
    axis: int
    index: Index


@dataclass(frozen=True)
class Count:
    """Inverse of `Coordinate`: the number of the true entry at ``index`` among all true entries of the mask."""

    mask: Value
    index: tuple[Index, ...]


@dataclass(frozen=True)
class Piece:
    """Row ``index`` of a tensor, counted from where piece ``number`` of its split begins."""

    split: Value
    number: int
    index: Index


@dataclass(frozen=True)
class Start:
    """Where piece ``number`` of a split begins."""

    split: Value
    number: int


@dataclass(frozen=True)
class Quotient:
    """``index // divisor``, where that is no simpler expression."""

    index: Index
    divisor: Size


@dataclass(frozen=True)
class Remainder:
    """``index % divisor``, where that is no simpler expression."""

    index: Index
    divisor: Size


Atom = Var | Element | Sorted | Rank | Coordinate | Count | Piece | Start | Quotient | Remainder


@dataclass(frozen=True)
class Index:
    """``constant + sum of coefficient * atom``, atoms all different and in the order of their first appearance."""

    constant: Size = 0
    terms: frozenset[tuple[Atom, Size]] = frozenset()

    def __repr__(self) -> str:
        parts = [f"{c}*{a}" if c != 1 else f"{a}" for a, c in self.terms]
        return " + ".join(parts + ([str(self.constant)] if self.constant != 0 or not parts else []))

    @property
    def atom(self) -> Atom | None:
        """The atom, if the expression is nothing else."""
        if len(self.terms) != 1 or self.constant != 0:
            return None
        ((atom, coefficient),) = self.terms
        return atom if coefficient == 1 else None

    @property
    def number(self) -> int | None:
        """The number, if the expression is one."""
        return self.constant if not self.terms and isinstance(self.constant, int) else None


def size_of(size: Any) -> Size:
    """A size as a number or sympy expression; adds no guard."""
    if isinstance(size, torch.SymInt):
        size = size.node.expr
    return int(size) if isinstance(size, sympy.Integer) else size


def sizes_of(value: Value) -> tuple[Size, ...]:
    """The shape of a value as numbers and sympy expressions, with what is known of sizes that depend on data."""
    return tuple(size_of(value.known.apply(s)) if isinstance(s, torch.SymInt) else s for s in value.shape)


def part_sizes(whole: Value, axis: int) -> list[Size]:
    """Sizes along ``axis`` of the parts of a chunk or split."""
    known = whole.known.parts.get((whole.node, axis))  # asked for once a part
    if known is None:
        sizes = [part.shape[axis] for part in whole.example]
        known = [size_of(whole.known.apply(s)) if isinstance(s, torch.SymInt) else s for s in sizes]
        whole.known.parts[whole.node, axis] = known
    return known


def constant(number: Size) -> Index:
    """A number as an index."""
    return Index(number)


ZERO = Index()


def of_atom(atom: Atom) -> Index:
    """An atom as an index."""
    return Index(0, frozenset(((atom, 1),)))


class Variables:
    """Makes index variables that are all different."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def new(self, size: Size) -> Index:
        """A fresh variable; one of size 1 is 0."""
        return ZERO if isinstance(size, int) and size == 1 else of_atom(Var(next(self._numbers), size))


def add(a: Index, b: Index) -> Index:
    """A + b."""
    if not b.terms and b.constant == 0:
        return a
    if not a.terms and a.constant == 0:
        return b
    return _collect(a.constant + b.constant, itertools.chain(a.terms, b.terms))


def scale(a: Index, factor: Size) -> Index:
    """A * factor."""
    if isinstance(factor, int) and factor == 1:
        return a
    return _collect(a.constant * factor, ((atom, c * factor) for atom, c in a.terms))


def _collect(number: Size, terms: Iterable[tuple[Atom, Size]]) -> Index:
    found: dict[Atom, Size] = {}
    for atom, coefficient in terms:
        found[atom] = found.get(atom, 0) + coefficient
    found = {a: c for a, c in found.items() if c != 0}
    for atom in [a for a in found if isinstance(a, Remainder)]:
        whole = Quotient(atom.index, atom.divisor)
        if whole in found and found[whole] == found[atom] * atom.divisor:  # (a // n) * n + a % n
            coefficient = found.pop(atom)
            del found[whole]
            rest = add(Index(number, frozenset(found.items())), scale(atom.index, coefficient))
            return rest
    return Index(number, frozenset(found.items()))


def divide(a: Index, n: Size) -> Index:
    """A // n, for a >= 0 and n > 0."""
    return _split(a, n)[0]


def remainder(a: Index, n: Size) -> Index:
    """A % n, for a >= 0 and n > 0."""
    return _split(a, n)[1]


def _split(a: Index, n: Size) -> tuple[Index, Index]:
    if isinstance(n, int) and n in (0, 1):  # a size of 0: there is no element, so any index will do
        return a, ZERO
    whole: list[tuple[Atom, Size]] = []
    rest: list[tuple[Atom, Size]] = []
    for atom, coefficient in a.terms:
        quotient = _exact(coefficient, n)
        if quotient is None:
            rest.append((atom, coefficient))
        else:
            whole.append((atom, quotient))
    quotient = _exact(a.constant, n)
    number, left = (quotient, 0) if quotient is not None else (0, a.constant)
    if isinstance(left, int) and isinstance(n, int):
        number, left = left // n, left % n
    remaining = Index(left, frozenset(rest))
    outer = Index(number, frozenset(whole))
    if _below(remaining, n):
        return outer, remaining
    if not outer.terms and outer.constant == 0:
        return of_atom(Quotient(a, n)), of_atom(Remainder(a, n))
    return add(outer, of_atom(Quotient(remaining, n))), of_atom(Remainder(remaining, n))


def _exact(a: Size, n: Size) -> Size | None:
    """A / n if that leaves no rest."""
    if isinstance(a, int) and a == 0:
        return 0
    if isinstance(a, int) and isinstance(n, int):
        return a // n if a % n == 0 else None
    ratio = a / n
    if not (ratio.is_integer and ratio.is_polynomial()):
        return None
    return int(ratio) if ratio.is_Integer else ratio


def _below(a: Index, n: Size) -> bool:
    """Whether a is known to be in 0..n-1."""
    largest: Size = a.constant
    for atom, coefficient in a.terms:
        bound = _limit(atom)
        if bound is None or not _nonnegative(coefficient):
            return False
        largest = largest + coefficient * (bound - 1)
    return _nonnegative(a.constant) and _nonnegative(n - 1 - largest)


def _limit(atom: Atom) -> Size | None:
    """What an atom is below, if that is known."""
    if isinstance(atom, Var):
        return atom.size
    if isinstance(atom, Remainder):
        return atom.divisor
    if isinstance(atom, Coordinate):
        return sizes_of(atom.mask)[atom.axis]
    if isinstance(atom, (Sorted, Rank)):
        return sizes_of(atom.permutation)[-1]
    return None


def _nonnegative(a: Size) -> bool:
    if isinstance(a, int):
        return a >= 0
    return bool(a.is_nonnegative) or bool(getattr(a.expand(), "is_nonnegative", False))


def flatten(index: Sequence[Index], sizes: Sequence[Size]) -> Index:
    """Row-major position of ``index`` in a tensor of ``sizes``."""
    position = ZERO
    for i, size in zip(index, sizes, strict=True):
        position = add(scale(position, size), i)
    return position


def unflatten(position: Index, sizes: Sequence[Size]) -> tuple[Index, ...]:
    """Inverse of `flatten`."""
    index: list[Index] = []
    for size in reversed(sizes[1:]):
        index.append(remainder(position, size))
        position = divide(position, size)
    return (position, *reversed(index)) if sizes else ()


def unbounded(index: Index) -> Index:
    """The entry of an integer tensor itself, where an index is that but bounded."""
    atom = index.atom
    return of_atom(replace(atom, most=None)) if isinstance(atom, Element) else index


def mentions(index: Iterable[Index], part: Index) -> bool:
    """Whether an atom of ``part`` occurs in an index, at any depth; an axis of one entry occurs nowhere."""
    wanted = {a for a, _ in part.terms}
    return any(a in wanted for i in index for a in atoms(i))


def substitute(index: Index, replaced: Callable[[Any], Index | None]) -> Index:
    """``index`` with atoms replaced, at any depth."""
    result = Index(index.constant)
    for atom, coefficient in index.terms:
        result = add(result, scale(_substituted(atom, replaced), coefficient))
    return result


def _substituted(atom: Atom, replaced: Callable[[Any], Index | None]) -> Index:
    new = replaced(atom)
    if new is not None:
        return new
    if isinstance(atom, Element):
        return of_atom(Element(atom.value, tuple(substitute(i, replaced) for i in atom.index), atom.most))
    if isinstance(atom, Count):
        return of_atom(Count(atom.mask, tuple(substitute(i, replaced) for i in atom.index)))
    if isinstance(atom, Sorted):
        return sorted_at(atom.permutation, substitute(atom.index, replaced))
    if isinstance(atom, Rank):
        return rank_of(atom.permutation, substitute(atom.index, replaced))
    if isinstance(atom, Coordinate):
        return coordinate(atom.mask, atom.axis, substitute(atom.index, replaced))
    if isinstance(atom, Quotient):
        return divide(substitute(atom.index, replaced), atom.divisor)
    if isinstance(atom, Remainder):
        return remainder(substitute(atom.index, replaced), atom.divisor)
    if isinstance(atom, Piece):
        return of_atom(Piece(atom.split, atom.number, substitute(atom.index, replaced)))
    return of_atom(atom)


def sorted_at(permutation: Value, index: Index) -> Index:
    """``permutation[index]``."""
    atom = index.atom
    if isinstance(atom, Rank) and atom.permutation is permutation:
        return atom.index
    return of_atom(Sorted(permutation, index))


def rank_of(permutation: Value, index: Index) -> Index:
    """``inverse permutation[index]``."""
    atom = index.atom
    if isinstance(atom, Sorted) and atom.permutation is permutation:
        return atom.index
    return of_atom(Rank(permutation, index))


def coordinate(mask: Value, axis: int, index: Index) -> Index:
    """Coordinate ``axis`` of the true entry with number ``index``."""
    atom = index.atom
    if isinstance(atom, Count) and atom.mask is mask:
        return atom.index[axis]
    return of_atom(Coordinate(mask, axis, index))


def atoms(index: Index) -> Iterable[Atom]:
    """Every atom of an expression, at any depth."""
    for atom, _ in index.terms:
        yield atom
        inner: tuple[Index, ...] = ()
        if isinstance(atom, (Element, Count)):
            inner = atom.index
        elif isinstance(atom, (Sorted, Rank, Coordinate, Quotient, Remainder, Piece)):
            inner = (atom.index,)
        for part in inner:
            yield from atoms(part)
