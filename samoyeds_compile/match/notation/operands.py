"""Ids and routing weights of one choice as tensors [T, K]."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import Element, Index, Size, Var, atoms, flatten, sizes_of
from samoyeds_compile.match.notation.terms import Call, Given, Leaf
from samoyeds_compile.match.region import Derived, Operand, require

if TYPE_CHECKING:
    from samoyeds_compile.match.notation.branch import Branch


class Operands:
    """Tensors for a branch.

    Args:
        branch: one that stands for all experts of its choice.
        tokens: flat index of a token.
        count: T.
        experts: E.

    Attributes:
        top_k: K.
        table: the ids [T, K].
    """

    def __init__(self, branch: Branch, tokens: Index, count: Size, experts: int) -> None:
        self.branch, self.tokens, self.count, self.experts = branch, tokens, count, experts
        element = branch.ids.atom
        assert isinstance(element, Element)
        top_k = branch.slot.atom.size if isinstance(branch.slot.atom, Var) else 1
        require(isinstance(top_k, int), "the number of experts a token goes to is not static", element.value)
        self.top_k: int = top_k
        table = self._table(element.value, element.index)
        require(table is not None, "the expert ids are no table [T, K]", element.value)
        assert table is not None
        self.table = table if element.most is None else Derived(torch.clamp_max, (table, element.most))

    def ids(self) -> Operand:
        """The ids [T, K]; E where what a choice depends on does not hold."""
        kept = self._kept()
        if not kept:
            return self.table
        every = functools.reduce(lambda a, b: Derived(torch.logical_and, (a, b)), kept)
        dropped = Derived(torch.logical_not, (every,))
        return Derived(torch.Tensor.masked_fill, (self.table, dropped, self.experts))

    def computed(self) -> list[Value]:
        """What follows from the ids and says whether a choice is kept."""
        return [leaf.value for leaf in leaves_of(self.branch.conditions) if not isinstance(leaf, Given)]

    def flags(self) -> list[Value]:
        """What else says whether a choice is kept."""
        return [leaf.value for leaf in leaves_of(self.branch.conditions) if isinstance(leaf, Given)]

    def _kept(self) -> list[Operand]:
        return [self._operand(term) for term in self.branch.conditions]

    def filled(self, term: Any) -> Operand:
        """A term as a tensor [T, K]."""
        operand = self._operand(term)
        if isinstance(operand, (int, float)):
            return Derived(
                torch.full_like, (self.table, operand), (("dtype", self.branch.function.down.product.dtype),)
            )
        narrow = self.top_k > 1 and not self._has_slot(term)
        return Derived(torch.Tensor.expand, (operand, -1, self.top_k)) if narrow else operand

    def _has_slot(self, term: Any) -> bool:
        if isinstance(term, Leaf):
            return any(a == self.branch.slot.atom for i in term.index for a in atoms(i))
        return isinstance(term, Call) and any(self._has_slot(a) for a in term.arguments)

    def _operand(self, term: Any) -> Any:
        if isinstance(term, Call):
            arguments = tuple(self._operand(a) for a in term.arguments)
            return Derived(term.function, arguments, term.keywords)
        if not isinstance(term, Leaf):
            return term
        found = self._looked_up(term) or self._table(term.value, term.index)
        require(found is not None, "a factor is neither [T, K] nor looked up by the expert ids", term.value)
        return found

    def _table(self, value: Value, index: tuple[Index, ...]) -> Operand | None:
        """The tensor [T, K] (or [T, 1]) whose entry at (t, k) is ``value[index]``."""
        sizes, top_k, slot = sizes_of(value), self.top_k, self.branch.slot
        position = flatten(index, sizes)
        total = math.prod(sizes)
        if position == flatten((self.tokens, slot), (self.count, top_k)) and total == self.count * top_k:
            two = len(sizes) == 2 and sizes[1] == top_k
            return value if two else Derived(torch.reshape, (value, (-1, top_k)))
        if position == flatten((slot, self.tokens), (top_k, self.count)) and total == self.count * top_k:
            return Derived(torch.t, (Derived(torch.reshape, (value, (top_k, -1))),))
        if position == self.tokens and total == self.count:
            return Derived(torch.reshape, (value, (-1, 1)))
        last = index[-1].number if index else None
        if last is not None and len(index) >= 2 and flatten(index[:-1], sizes[:-1]) == self.tokens:
            columns = Derived(torch.reshape, (value, (-1, sizes[-1])))
            return Derived(torch.narrow, (columns, 1, last, 1))
        return None

    def _looked_up(self, leaf: Leaf) -> Operand | None:
        """``scores[t, ids[t, k]]`` or ``scale[ids[t, k]]``."""
        value, index, branch = leaf.value, leaf.index, self.branch
        by_expert = bool(index) and (
            index[-1] == branch.ids or (branch.expert is not None and index[-1].number == branch.expert
                                        and sizes_of(value)[-1] == self.experts and not self._has_slot(leaf))
        )  # fmt: skip
        if not by_expert:
            return None
        if len(index) == 1:
            return Derived(getitem, (value, self.table))
        if flatten(index[:-1], sizes_of(value)[:-1]) != self.tokens:
            return None
        table = value if len(index) == 2 else Derived(torch.reshape, (value, (-1, sizes_of(value)[-1])))
        wide = Derived(torch.Tensor.to, (self.table, torch.int64))
        return Derived(torch.gather, (table, 1, wide))


def leaves_of(term: Any) -> Iterator[Leaf]:
    """The elements that stand in terms."""
    if isinstance(term, Leaf):
        yield term
    arguments = term.arguments if isinstance(term, Call) else term if isinstance(term, tuple) else ()
    for argument in arguments:
        yield from leaves_of(argument)
