"""A few rows at a time: masks and packing take many times a weight's bytes for what they work on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_compile.sparsity.projections import Projection

VALUES = 2**15
"""How many values to work on at a time, about; they take some 100 bytes each."""
PARTS = 256
"""A large matrix is worked on in so many parts, about, instead: to start an op takes time too, on a GPU most of it."""


def row_slices(rows: int, cols: int, unit: int = 1) -> Iterator[slice]:
    """Slices of whole units of rows; only the last may be ragged."""
    values = max(VALUES, rows * cols // PARTS)
    step = max(values // (cols * unit), 1) * unit
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, cols] that is in another order than it is stored in, and copied only where it is read.

    Attributes:
        stored: [rows, cols], a view.
        row_index: [rows], where the rows lie in ``stored``; None if in place.
        col_index: [cols], the same of columns.
    """

    stored: Tensor
    row_index: Tensor | None = None
    col_index: Tensor | None = None

    @classmethod
    def of(cls, projection: Projection, expert: int, order: Tensor | None = None) -> Matrix:
        """An expert's, gate rows before up rows, with its intermediate features in an order."""
        stored, row_index = projection.stored_matrix(expert), projection.row_index()
        if order is None:
            return cls(stored, row_index)
        if projection.role == "down":
            return cls(stored, row_index, order)
        moved = runs_of(order, len(stored))
        return cls(stored, moved if row_index is None else row_index[moved])

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols)."""
        return int(self.stored.shape[0]), int(self.stored.shape[1])

    def rows(self, part: slice) -> Tensor:
        """Some rows, [n, cols]."""
        found = self.stored[part] if self.row_index is None else self.stored[self.row_index[part]]
        return found if self.col_index is None else found[:, self.col_index]


def runs_of(order: Tensor, count: int) -> Tensor:
    """The order of ``count`` rows, which are one or more runs of all features."""
    return torch.cat([order + start for start in range(0, count, len(order))])
