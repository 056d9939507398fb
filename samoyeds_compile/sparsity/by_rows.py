"""Masks and packing a few rows at a time: both take many times a weight's bytes for what they work on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import PackedWeight, pack
from samoyeds_compile.sparsity.solver import best_mask

VALUES = 2**18
"""How many values to work on at a time, about."""


def row_slices(rows: int, cols: int, config: SparsityConfig) -> Iterator[slice]:
    """Slices of whole groups of blocks of rows; only the last may be ragged."""
    group = config.m * config.group
    step = max(VALUES // (cols * group), 1) * group
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def mask_by_rows(scores: Tensor, config: SparsityConfig) -> Tensor:
    """`best_mask` of a matrix [rows, cols]."""
    rows, cols = scores.shape
    return torch.cat([best_mask(scores[part], config) for part in row_slices(rows, cols, config)])


def pack_by_rows(weight: Tensor, config: SparsityConfig, name: str) -> PackedWeight:
    """`pack` of a matrix [rows, cols].

    Raises:
        SparsityError: it does not have the pattern.
    """
    rows, cols = weight.shape
    parts = [pack(weight[part], config, name) for part in row_slices(rows, cols, config)]
    metadata, selection = [p.metadata for p in parts], [p.selection for p in parts]
    return PackedWeight(
        torch.cat([p.values for p in parts]),
        torch.cat([t for t in metadata if t is not None]) if metadata[0] is not None else None,
        torch.cat([t for t in selection if t is not None]) if selection[0] is not None else None,
        (rows, cols),
        config,
    )
