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

from samoyeds_codegen.cpp.spec import STRIP, strip_rows
from samoyeds_compile.huge_pages import on_huge_pages
from samoyeds_compile.sparsity.blocks import padded_shape
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import PackedWeight

CHUNK = 32
"""Columns whose values of one strip lie together."""
FOURS = CHUNK // 4
WORDS = CHUNK // 16
IN_PLACE = 16 * STRIP
"""Condensed rows that are rearranged at a time where it is done in place."""
Axes = tuple[int, ...]


def fits(rows: int, cols: int, config: SparsityConfig, dtype: torch.dtype) -> bool:
    """Whether matrices [rows, cols] are stored in strips: whole ones, of numbers that CPU kernels compute with.

    Columns must be as many as would be whole strips, too: the outputs of one projection are the inputs of another, and
    kernels want all in strips or none.
    """
    unit = strip_rows(config.n, config.m)
    shares = config.group == 1 or config.group * config.n % STRIP == 0
    is_whole = rows % unit == cols % unit == 0 and padded_shape(rows, cols, config)[0] == rows
    in_records = padded_shape(rows, cols, config)[1] % CHUNK == 0
    return config.inner == "2:4" and shares and is_whole and in_records and dtype in (torch.float32, torch.bfloat16)


def to_strips(packed: PackedWeight) -> PackedWeight:
    """Canonical storage in strips; sizes that `fits` accepts."""
    return _rearranged(packed, _into)


def to_strips_(packed: PackedWeight) -> None:
    """The same in place, some rows at a time, so that no second copy is in memory: a strip lies where its rows lay."""
    for tensor, parts, order in _orders(packed):
        for matrix in tensor if tensor.dim() == 3 else [tensor]:
            for rows in matrix.split(IN_PLACE):
                rows.copy_(_into(rows, parts, order))


def from_strips(packed: PackedWeight) -> PackedWeight:
    """Inverse of `to_strips`."""
    return _rearranged(packed, _out_of)


def _orders(packed: PackedWeight) -> list[tuple[Tensor, Axes, Axes]]:
    """What is to be rearranged: how columns are cut, and the order of [strip, row, record, ...] afterwards."""
    assert packed.metadata is not None
    pairs = (0, 2, 3, 1, 4) if packed.values.element_size() == 2 else (0, 2, 3, 4, 1)
    found: list[tuple[Tensor, Axes, Axes]] = [
        (packed.values, (FOURS, 2), pairs),
        (packed.metadata, (WORDS,), (0, 2, 1, 3)),
    ]
    own = packed.selection if packed.config.group == 1 else None
    return found if own is None else [*found, (own, (), (0, 2, 1))]


def _rearranged(packed: PackedWeight, change: Callable[[Tensor, Axes, Axes], Tensor]) -> PackedWeight:
    values, metadata, *selection = [change(*each) for each in _orders(packed)]
    return replace(packed, values=values, metadata=metadata, selection=selection[0] if selection else packed.selection)


def _into(rows: Tensor, parts: Axes, order: Axes) -> Tensor:
    """Rows [..., R, C] as [..., R/16, 16, C/parts, *parts], the last dimensions in another order."""
    *lead, height, width = rows.shape
    cut = rows.reshape(*lead, height // STRIP, STRIP, width // math.prod(parts), *parts)
    made = on_huge_pages(torch.empty_like(rows, memory_format=torch.contiguous_format))
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
