"""A weight cut into blocks: padding, and views that put the parts of a pattern on axes of their own."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from samoyeds_compile.sparsity.config import SparsityConfig


def round_up(size: int, step: int) -> int:
    """The least multiple of ``step`` that is not below ``size``."""
    return -(-size // step) * step


def padded_shape(rows: int, cols: int, config: SparsityConfig) -> tuple[int, int]:
    """Rows and columns after padding to whole groups of blocks and whole vectors."""
    return round_up(rows, config.m * config.group), round_up(cols, config.vector)


def padded(tensor: Tensor, config: SparsityConfig, fill: float = 0.0) -> Tensor:
    """[..., rows, cols] with ``fill`` in padded columns and 0 in padded rows."""
    rows, cols = tensor.shape[-2:]
    whole_rows, whole_cols = padded_shape(rows, cols, config)
    if (whole_rows, whole_cols) == (rows, cols):
        return tensor
    return F.pad(F.pad(tensor, (0, whole_cols - cols), value=fill), (0, 0, 0, whole_rows - rows))


def cut(tensor: Tensor, config: SparsityConfig) -> Tensor:
    """A padded [..., rows, cols] as [..., groups, group, m, vectors, vector]; a view where strides allow."""
    rows, cols = tensor.shape[-2:]
    blocks = (rows // (config.m * config.group), config.group, config.m, cols // config.vector, config.vector)
    return tensor.reshape(*tensor.shape[:-2], *blocks)


def joined(blocks: Tensor) -> Tensor:
    """Inverse of `cut`."""
    groups, group, m, vectors, vector = blocks.shape[-5:]
    return blocks.reshape(*blocks.shape[:-5], groups * group * m, vectors * vector)
