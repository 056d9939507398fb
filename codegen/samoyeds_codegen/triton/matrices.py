"""Matrices of experts that lie apart, as kernels read them: where each begins, seen from the first.

A kernel gets the first matrix and a table of distances, so that nothing is stacked. The table is written on the device,
by a kernel whose arguments are the distances: there is no copy from the host, which would have to wait, or which a CUDA
graph would repeat from memory that somebody else has by then. Every call writes its own. So a table cannot outlive the
matrices that it is of, follows parameters that are replaced, and is part of a CUDA graph like the rest of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.emit import TABLE_WIDTH, emit_table

ALIGNED = 16
"""Bytes that a load can have at most; where all matrices begin at multiples of it, tables count in these."""


@dataclass(frozen=True)
class Matrices:
    """A matrix of each expert, all of one shape, dtype and strides, wherever they are on one device.

    Attributes:
        first: [rows, cols], that of expert 0.
        table: int64 [E], where each begins, in units from where the first does.
        unit: elements; the kernel is compiled for it, as more than one lets it load several at once.
    """

    first: Tensor
    table: Tensor
    unit: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, rows, cols."""
        rows, cols = self.first.shape
        return self.table.shape[0], rows, cols

    @property
    def dtype(self) -> torch.dtype:
        """Of all matrices."""
        return self.first.dtype

    @property
    def device(self) -> torch.device:
        """Of all matrices."""
        return self.first.device

    @property
    def mT(self) -> Matrices:
        """Each matrix transposed."""
        return replace(self, first=self.first.mT)

    def narrow(self, start: int, rows: int) -> Matrices:
        """So many rows of each matrix."""
        return replace(self, first=self.first.narrow(0, start, rows))

    def half(self, index: int, alternate: bool) -> Matrices:
        """Half of the rows of each matrix: the first or second one, or every other one."""
        return replace(self, first=self.first[index::2] if alternate else self.first.chunk(2)[index])


def apart(*operands: Sequence[Tensor]) -> list[Matrices]:
    """The matrices of several operands; one launch for every `TABLE_WIDTH` matrices of all of them.

    Args:
        operands: a list of matrices [rows, cols] each, or one stack [E, rows, cols], which is read as matrices.

    Raises:
        UnsupportedSpecError: matrices of one operand differ in shape, dtype, device or strides, or are apart by no
            whole number of elements.
    """
    lists = [list(of[0].unbind()) if len(of) == 1 and of[0].dim() == 3 else list(of) for of in operands]
    found = [distances(of) for of in lists]
    tables = _written([number for numbers, _ in found for number in numbers], lists[0][0].device)
    parts = tables.split([len(of) for of in lists])
    return [Matrices(of[0], part, unit) for of, part, (_, unit) in zip(lists, parts, found, strict=True)]


def distances(matrices: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each matrix begins, in units from the first, and how many elements a unit has.

    Raises:
        UnsupportedSpecError: as `apart` says.
    """
    first, size = matrices[0], matrices[0].element_size()
    shape, strides, dtype, device = first.shape, first.stride(), first.dtype, first.device
    for each in matrices:
        if each.shape != shape or each.stride() != strides or each.dtype != dtype or each.device != device:
            raise UnsupportedSpecError("the matrices of the experts differ in shape, strides, dtype or device")
    starts = [each.data_ptr() for each in matrices]
    unit = ALIGNED if all(start % ALIGNED == 0 for start in starts) else size
    bytes_apart = [start - starts[0] for start in starts]
    if any(number % unit for number in bytes_apart):
        raise UnsupportedSpecError("matrices of experts are apart by no whole number of elements")
    return [number // unit for number in bytes_apart], unit // size


def _written(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as a tensor on the device, int64 [n]."""
    rounds = -(-len(numbers) // TABLE_WIDTH)
    out = torch.empty(rounds * TABLE_WIDTH, dtype=torch.int64, device=device)
    for start in range(0, len(numbers), TABLE_WIDTH):
        given = list(numbers[start : start + TABLE_WIDTH])
        given += [0] * (TABLE_WIDTH - len(given))
        _module().table[(1,)](out[start:], *given, num_warps=1)
    return out[: len(numbers)]


@functools.cache
def _module() -> ModuleType:
    return load_text("table", emit_table())
