"""The order of packed weights that CPU kernels read best: strips, 16 condensed rows side by side.

The same bits as canonical storage, in tensors of the same shapes. Lanes of a vector register are rows then, so that one
load brings values of 16 rows, and one shuffle the columns that belong to them. R condensed rows and C columns become

    values     [R/16, C/32, 8 groups of four columns, 2, 16 rows], the last two swapped if values have 16 bits
    metadata   [R/16, C/32, 16 rows, 2]
    selection  [R/16, C/vector, 16 rows]; canonical where blocks of rows share a choice
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samoyeds_codegen.cpp.spec import STRIP
from samoyeds_compile.sparsity.blocks import padded_shape
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import PackedWeight
from samoyeds_compile.sparsity.pages import advise_huge

CHUNK = 32
"""Columns whose values of one strip lie together."""
FOURS = CHUNK // 4
WORDS = CHUNK // 16
Axes = tuple[int, ...]


def fits(rows: int, cols: int, config: SparsityConfig, dtype: torch.dtype) -> bool:
    """Whether matrices [rows, cols] are stored in strips: whole ones, of numbers that CPU kernels compute with.

    Columns must be as many as would be whole strips, too: the outputs of one projection are the inputs of another, and
    kernels want all in strips or none.
    """
    unit = STRIP * config.m // config.n
    shares = config.group == 1 or config.group * config.n % STRIP == 0
    is_whole = rows % unit == cols % unit == 0 and padded_shape(rows, cols, config)[0] == rows
    in_records = padded_shape(rows, cols, config)[1] % CHUNK == 0
    return config.inner == "2:4" and shares and is_whole and in_records and dtype in (torch.float32, torch.bfloat16)


def to_strips(packed: PackedWeight) -> PackedWeight:
    """Canonical storage in strips; sizes that `fits` accepts."""
    return _rearranged(packed, _into)


def to_strips_(packed: PackedWeight) -> None:
    """The same in place, matrix by matrix, so that no second copy of a stack is in memory."""
    matrices = [packed] if packed.values.dim() == 2 else [_matrix(packed, e) for e in range(len(packed.values))]
    for matrix in matrices:
        made = to_strips(matrix)
        for old, new in zip(_tensors(matrix), _tensors(made), strict=True):
            if old is not new:
                old.copy_(new)


def _matrix(packed: PackedWeight, expert: int) -> PackedWeight:
    metadata, selection = (None if t is None else t[expert] for t in (packed.metadata, packed.selection))
    return replace(packed, values=packed.values[expert], metadata=metadata, selection=selection)


def _tensors(packed: PackedWeight) -> list[Tensor]:
    return [t for t in (packed.values, packed.metadata, packed.selection) if t is not None]


def from_strips(packed: PackedWeight) -> PackedWeight:
    """Inverse of `to_strips`."""
    return _rearranged(packed, _out_of)


def _rearranged(packed: PackedWeight, change: Callable[[Tensor, Axes, Axes], Tensor]) -> PackedWeight:
    assert packed.metadata is not None
    pairs = (0, 2, 3, 1, 4) if packed.values.element_size() == 2 else (0, 2, 3, 4, 1)
    values, metadata = change(packed.values, (FOURS, 2), pairs), change(packed.metadata, (WORDS,), (0, 2, 1, 3))
    selection = packed.selection
    if selection is not None and packed.config.group == 1:
        selection = change(selection, (), (0, 2, 1))
    return replace(packed, values=values, metadata=metadata, selection=selection)


def _into(rows: Tensor, parts: Axes, order: Axes) -> Tensor:
    """Rows [..., R, C] as [..., R/16, 16, C/parts, *parts], the last dimensions in another order."""
    *lead, height, width = rows.shape
    cut = rows.reshape(*lead, height // STRIP, STRIP, width // math.prod(parts), *parts)
    made = advise_huge(torch.empty_like(rows, memory_format=torch.contiguous_format))
    permuted = _permuted(cut, order)
    return made.view(permuted.shape).copy_(permuted).view(rows.shape)


def _out_of(strips: Tensor, parts: Axes, order: Axes) -> Tensor:
    """Inverse of `_into`."""
    *lead, height, width = strips.shape
    sizes = (height // STRIP, STRIP, width // math.prod(parts), *parts)
    laid = strips.reshape(*lead, *(sizes[axis] for axis in order))
    return _permuted(laid, tuple(order.index(axis) for axis in range(len(order)))).reshape(strips.shape)


def _permuted(tensor: Tensor, order: Axes) -> Tensor:
    lead = tensor.dim() - len(order)
    return tensor.permute(*range(lead), *(lead + axis for axis in order))
