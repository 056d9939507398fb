"""The pattern that keeps the most of a score.

The choice separates: what a sub-row is worth in a vector does not depend on other sub-rows, and of four values the two
largest are worth the most. So the best two of every four, then the best n of every m sub-rows, is the optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.blocks import cut, joined, padded
from samoyeds_compile.sparsity.config import SparsityConfig

PADDING = -1.0
"""Score of padded columns: below any real one, so that none is kept instead of a real one."""


def best_mask(scores: Tensor, config: SparsityConfig) -> Tensor:
    """Which values to keep so that the sum of their scores is the largest; of equal scores the first is kept.

    Args:
        scores: [..., rows, cols], what each value is worth; any floating dtype, not negative.
        config: the pattern.

    Returns:
        A boolean tensor like ``scores``. With ``inner="2:4"`` each full group of 4 columns of a kept sub-row keeps
        exactly 2 values.

    Raises:
        SparsityError: a score is negative, infinite or NaN, or ``scores`` is no matrix or stack.
    """
    require_matrix(scores, "scores")
    if not bool(((scores >= 0) & scores.isfinite()).all()):
        raise SparsityError("scores: some are negative, infinite or NaN; pass magnitudes, or another finite score")
    rows, cols = scores.shape[-2:]
    blocks = cut(padded(scores.to(torch.float64), config, fill=PADDING), config)
    inner = best_inner(blocks, config)
    sub_rows = best_sub_rows((blocks * inner).clamp(min=0), config)
    kept = inner & sub_rows[..., :, None, :, :, None]
    return joined(kept)[..., :rows, :cols].contiguous()


def best_inner(blocks: Tensor, config: SparsityConfig) -> Tensor:
    """What to keep inside of sub-rows: the two largest of every four columns, or all.

    Args:
        blocks: scores [..., groups, group, m, vectors, vector], padding below 0.
        config: the pattern.
    """
    if config.inner == "none":
        return torch.ones_like(blocks, dtype=torch.bool)
    fours = blocks.unflatten(-1, (-1, 4))
    order = fours.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(fours, dtype=torch.bool).scatter(-1, order[..., :2], True).flatten(-2)


def best_sub_rows(scores: Tensor, config: SparsityConfig) -> Tensor:
    """The sub-rows to keep, boolean [..., groups, m, vectors]: n of m, the same ones in all blocks of a group.

    Args:
        scores: [..., groups, group, m, vectors, vector], 0 for what is not kept inside of a sub-row.
        config: the pattern.
    """
    worth = scores.sum(dim=(-4, -1))
    order = worth.argsort(dim=-2, descending=True, stable=True)
    return torch.zeros_like(worth, dtype=torch.bool).scatter(-2, order[..., : config.n, :], True)


def require_matrix(tensor: Tensor, name: str) -> None:
    """Raise `SparsityError` unless a tensor is a floating matrix [rows, cols] or a stack [E, rows, cols]."""
    if not isinstance(tensor, Tensor) or tensor.dim() < 2 or not tensor.dtype.is_floating_point:
        what = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise SparsityError(f"{name}: is {what}; pass a floating matrix [rows, cols] or a stack [E, rows, cols]")
