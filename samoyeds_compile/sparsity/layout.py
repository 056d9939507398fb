"""How the storage of a parameter relates to rows of output features and columns of input features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from samoyeds_compile.errors import SparsityError


@dataclass(frozen=True)
class StorageLayout:
    """Where the rows and columns of a pattern lie in a stored parameter.

    Attributes:
        transposed: the parameter is stored [..., cols, rows], input features first.
        interleaved: the rows of gate and up alternate; the pattern is of all gate rows, then all up rows.
        flat: how many matrices the parameter has one below the other, [E * ., .]; 0 if it is a matrix or a stack.
    """

    transposed: bool = False
    interleaved: bool = False
    flat: int = 0

    def to_rows(self, stored: Tensor, name: str = "weight") -> Tensor:
        """A stored [..., ., .] as [..., rows, cols]: a view, but for interleaved rows a copy.

        Raises:
            SparsityError: an odd number of rows cannot be interleaved, or rows are no whole number of matrices.
        """
        if self.flat:
            if stored.dim() != 2 or stored.shape[0] % self.flat:
                raise SparsityError(f"{name}: {list(stored.shape)} is not {self.flat} matrices; pass flat=0")
            stored = stored.unflatten(0, (self.flat, -1))
        matrix = stored.mT if self.transposed else stored
        if not self.interleaved:
            return matrix
        if matrix.shape[-2] % 2:
            rows = f"{name}: has {matrix.shape[-2]} rows, which cannot alternate between gate and up"
            raise SparsityError(f"{rows}; pass interleaved=False")
        pairs: Tensor = matrix.unflatten(-2, (-1, 2))
        return pairs.transpose(-3, -2).flatten(-3, -2)

    def to_stored(self, rows: Tensor) -> Tensor:
        """Inverse of `to_rows`."""
        if self.interleaved:
            halves: Tensor = rows.unflatten(-2, (2, -1))
            rows = halves.transpose(-3, -2).flatten(-3, -2)
        stored = rows.mT if self.transposed else rows
        return stored.flatten(0, 1) if self.flat else stored
