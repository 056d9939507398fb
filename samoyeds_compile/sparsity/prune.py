"""Prune one expert's matrix by a method: the method's score or update, the mask, and its refinement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.by_rows import mask_by_rows
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.refine import refine
from samoyeds_compile.sparsity.scores import score
from samoyeds_compile.sparsity.second_order import second_order
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
class Pruned:
    """One expert's matrix [rows, cols] after pruning, and the share of the squared scores that its mask keeps."""

    weight: Tensor
    mask: Tensor
    kept_energy: float


def prune(
    weight: Tensor, stats: InputStats | None, expert: int, config: SparsityConfig, method: Method, refines: bool
) -> Pruned:
    """Prune the matrix [rows, cols] of an expert; by magnitude where no token reached it."""
    reached = stats if stats is not None and stats.reached(expert) else None
    squared = squared_score(weight, stats, expert, method)
    if method.updates and reached is not None and reached.hessian is not None:
        values, mask = second_order(weight, reached.hessian[expert], config)
    else:
        values, mask = weight, mask_by_rows(squared, config)
        if refines and reached is not None:
            mask = refine(weight, mask, reached.mean(expert), reached.norm(expert).square(), config)
    total = float(squared.sum())
    energy = float((squared * mask).sum()) / total if total else 1.0
    return Pruned(torch.where(mask, values, 0).to(weight.dtype), mask, energy)


def squared_score(weight: Tensor, stats: InputStats | None, expert: int, method: Method) -> Tensor:
    """What each value is worth to a method, [rows, cols] float32, in an arbitrary scale that can't overflow."""
    found = score(weight, stats if method.calibrated else None, expert)
    largest = found.max().clamp(min=torch.finfo(torch.float32).tiny)
    return found.div_(largest).square_()
