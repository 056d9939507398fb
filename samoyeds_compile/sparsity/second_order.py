"""Pruning with an update of what is kept: SparseGPT (arXiv 2301.00774) with a two-level pattern.

Columns are visited from left to right. A value that is pruned leaves an error in the output; the columns to its right
are changed to make up for it, as the inverse of the second moments of the input says. The sub-rows of a vector of
columns are chosen when the sweep reaches the vector, the two of each four when it reaches the four, on values that hold
all updates so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.solver import best_mask

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean."""
ATTEMPTS = 6
"""How often the damping is made ten times as strong where the matrix still has no factors."""
TWO_OF_FOUR = SparsityConfig(1, 1, 16)


def second_order(
    weight: Tensor, hessian: Tensor, config: SparsityConfig, damping: float = DAMPING
) -> tuple[Tensor, Tensor]:
    """Prune a matrix so that its outputs change little.

    Args:
        weight: [rows, cols].
        hessian: [cols, cols], sum of x xᵀ over the inputs, in any scale.
        config: the pattern.
        damping: see `DAMPING`.

    Returns:
        The pruned and updated weight, float32, and the mask.

    Raises:
        SparsityError: no damping makes the second moments positive definite.
    """
    factor = inverse_factor(hessian, damping)
    kept = weight.float().clone()
    mask = torch.zeros_like(kept, dtype=torch.bool)
    cols = kept.shape[1]
    for start in range(0, cols, config.vector):
        stop = min(start + config.vector, cols)
        errors = _sweep(kept[:, start:stop], mask[:, start:stop], factor[start:stop, start:stop], config)
        kept[:, stop:] -= errors @ factor[start:stop, stop:]
    return kept, mask


def _sweep(vector: Tensor, mask: Tensor, factor: Tensor, config: SparsityConfig) -> Tensor:
    """Prune one vector of columns in place, and its mask; the errors to pass on, [rows, columns]."""
    diagonal = factor.diagonal()
    sub_rows = best_mask((vector / diagonal).square(), config).any(dim=1, keepdim=True)
    errors = torch.zeros_like(vector)
    for column in range(vector.shape[1]):
        if column % 4 == 0:
            four = slice(column, min(column + 4, vector.shape[1]))
            mask[:, four] = sub_rows
            if config.inner == "2:4":
                mask[:, four] &= best_mask((vector[:, four] / diagonal[four]).square(), TWO_OF_FOUR)
        pruned = vector[:, column] * mask[:, column]
        errors[:, column] = (vector[:, column] - pruned) / diagonal[column]
        vector[:, column] = pruned
        vector[:, column + 1 :] -= errors[:, column : column + 1] * factor[column, column + 1 :]
    return errors


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The upper triangular U, float32, with Uᵀ U = (H + damping · mean(diag H) · 1)⁻¹; computed in float64.

    Raises:
        SparsityError: no damping makes H positive definite.
    """
    moments = hessian.double()
    scale = moments.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for attempt in range(ATTEMPTS):
        damped = moments + torch.eye(len(moments), dtype=moments.dtype, device=moments.device) * (
            scale * damping * 10**attempt
        )
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if int(failed) == 0:
            factor: Tensor = upper.float()
            return factor
    raise SparsityError(
        "hessian: is not positive definite with any damping; check that the calibration inputs are finite"
    )
