"""Prune one expert's matrix by a method: the method's score or update, the mask, and its refinement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.by_rows import Matrix, row_slices
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.refine import refine
from samoyeds_compile.sparsity.scores import score
from samoyeds_compile.sparsity.second_order import second_order
from samoyeds_compile.sparsity.solver import best_mask
from samoyeds_compile.sparsity.stats import InputStats


@dataclass(frozen=True)
class Method:
    """What a method needs.

    Attributes:
        calibrated: calibration inputs.
        routed: tokens weighed by their routing weights.
        updates: second moments of the inputs, for an update of what is kept.
    """

    calibrated: bool = True
    routed: bool = False
    updates: bool = False


METHODS = {
    "magnitude": Method(calibrated=False),
    "wanda": Method(),
    "router_wanda": Method(routed=True),
    "second_order": Method(routed=True, updates=True),
}


def method_of(name: str, refines: bool, calibrated: bool) -> Method:
    """A method by its name.

    Raises:
        SparsityError: there is none of the name, it needs calibration and has none, or it can't be refined.
    """
    if name not in METHODS:
        raise SparsityError(f"method: is {name!r}; pass one of {', '.join(METHODS)}")
    method = METHODS[name]
    if (method.calibrated or refines) and not calibrated:
        need = f"method {name!r}" if method.calibrated else "refine=True"
        raise SparsityError(f"calibration: is None, but {need} needs it; pass model inputs, or method='magnitude'")
    if refines and method.updates:
        raise SparsityError(f"refine: method {name!r} fits kept values to its mask; pass refine=False")
    return method


@dataclass(frozen=True)
class Scores:
    """Squared scores of an expert's weights, float32, in an arbitrary scale that can't overflow.

    Attributes:
        norm: [cols] of the input features; None if weights count by their size.
        largest: score before it is squared; a scalar.
    """

    norm: Tensor | None
    largest: Tensor

    @classmethod
    def of(cls, matrix: Matrix, stats: InputStats | None, expert: int, method: Method) -> Scores:
        """By a method; by magnitude where no token reached the expert."""
        norm = stats.norm(expert) if method.calibrated and stats is not None and stats.reached(expert) else None
        largest = [score(matrix.rows(part), norm).max() for part in row_slices(*matrix.shape)]
        return cls(norm, torch.stack(largest).max().clamp(min=torch.finfo(torch.float32).tiny))

    def squared(self, weight: Tensor) -> Tensor:
        """What each value of some rows [n, cols] is worth."""
        return score(weight, self.norm).div_(self.largest).square_()


def squared_scores(matrix: Matrix, stats: InputStats | None, expert: int, method: Method) -> Tensor:
    """What each value is worth to a method, [rows, cols] float32."""
    scores = Scores.of(matrix, stats, expert, method)
    whole = torch.empty(matrix.shape, dtype=torch.float32, device=matrix.stored.device)
    for part in row_slices(*matrix.shape):
        whole[part] = scores.squared(matrix.rows(part))
    return whole


@dataclass(frozen=True)
class PrunedRows:
    """Some rows of one expert's matrix after pruning.

    Attributes:
        part: which rows.
        dense: [n, cols] as they were.
        weight: [n, cols].
        mask: bool [n, cols].
        kept, total: sums of the squared scores, of what is kept and of all.
    """

    part: slice
    dense: Tensor
    weight: Tensor
    mask: Tensor
    kept: float
    total: float


def pruned_rows(
    matrix: Matrix, stats: InputStats | None, expert: int, config: SparsityConfig, method: Method, refines: bool
) -> Iterator[PrunedRows]:
    """Prune the matrix of an expert, a few rows at a time; by magnitude where no token reached it.

    All of it is made at once only where values are updated.
    """
    reached = stats if stats is not None and stats.reached(expert) else None
    scores, updated = Scores.of(matrix, stats, expert, method), None
    if method.updates and reached is not None and reached.hessian is not None:
        updated = second_order(matrix.rows(slice(None)), reached.hessian[expert], config)
    for part in row_slices(*matrix.shape, config.m * config.group):
        dense = matrix.rows(part)
        squared = scores.squared(dense)
        if updated is not None:
            values, mask = updated[0][part], updated[1][part]
        else:
            values, mask = dense, best_mask(squared, config)
            if refines and reached is not None:
                mask = refine(dense, mask, reached.mean(expert), reached.norm(expert).square(), config)
        weight = torch.where(mask, values, 0).to(dense.dtype)
        yield PrunedRows(part, dense, weight, mask, float((squared * mask).sum()), float(squared.sum()))
