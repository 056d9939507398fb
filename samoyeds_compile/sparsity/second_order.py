"""Pruning with an update of what is kept: SparseGPT (arXiv 2301.00774) with a two-level pattern.

Columns are visited from left to right. A value that is pruned leaves an error in the output; the columns to its right
are changed to make up for it, as the inverse of the second moments of the input says. The two of each four are chosen
when the sweep reaches the four, on values that hold all updates so far. Of each vector of columns both ends are known
then for each sub-row: the error that is left if it is kept, and if all of it is pruned; so the sub-rows are kept for
which the difference is largest.
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
    values = weight.float().clone()
    mask = torch.zeros_like(values, dtype=torch.bool)
    cols = values.shape[1]
    for start in range(0, cols, config.vector):
        here = slice(start, min(start + config.vector, cols))
        values[:, here], mask[:, here], errors = _vector(values[:, here], factor[here, here], config)
        values[:, here.stop :] -= errors @ factor[here, here.stop :]
    return values, mask


def _vector(values: Tensor, factor: Tensor, config: SparsityConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Prune one vector of columns: its values, its mask, and the errors [rows, columns] to pass on."""
    dropped = torch.linalg.solve_triangular(factor, values, upper=True, left=False)
    kept, mask, errors = _two_of_four(values, factor) if config.inner == "2:4" else _all(values)
    worth = (dropped.square().sum(dim=1) - errors.square().sum(dim=1)).clamp(min=0)
    outer = SparsityConfig(config.n, config.m, config.vector, "none", config.group)
    sub_rows = best_mask(worth.unsqueeze(1), outer)
    return torch.where(sub_rows, kept, 0), mask & sub_rows, torch.where(sub_rows, errors, dropped)


def _all(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return values, torch.ones_like(values, dtype=torch.bool), torch.zeros_like(values)


def _two_of_four(values: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sweep over a vector of columns in which every sub-row is kept."""
    values, mask, errors = values.clone(), torch.zeros_like(values, dtype=torch.bool), torch.zeros_like(values)
    diagonal = factor.diagonal()
    for column in range(values.shape[1]):
        if column % 4 == 0:
            four = slice(column, min(column + 4, values.shape[1]))
            mask[:, four] = best_mask((values[:, four] / diagonal[four]).square(), TWO_OF_FOUR)
        pruned = values[:, column] * mask[:, column]
        errors[:, column] = (values[:, column] - pruned) / diagonal[column]
        values[:, column] = pruned
        values[:, column + 1 :] -= errors[:, column : column + 1] * factor[column, column + 1 :]
    return values, mask, errors


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
