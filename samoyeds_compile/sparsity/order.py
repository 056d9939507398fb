"""Search for an order of an expert's intermediate features of which the pattern keeps more.

Which features share a block of rows, or a four of down's columns, is what the pattern chooses between: strong features
next to weak ones lose the least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from samoyeds_compile.sparsity.blocks import cut, padded
from samoyeds_compile.sparsity.by_rows import Matrix, row_slices, runs_of
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.solver import PADDING, best_inner, best_mask

SWEEPS = 300
"""Rounds of trial swaps, at most."""
WORK = 2**28
"""Values of down that all rounds together may look at, for one expert; at least `LEAST_SWEEPS` rounds are made."""
LEAST_SWEEPS = 4


def best_order(ups: list[Tensor], down: Tensor, config: SparsityConfig, sweeps: int | None = None) -> Tensor:
    """An order of features that keeps more than the one there is, or that one.

    A few sorted orders are tried, then pairs of features of the best are swapped where that helps.

    Args:
        ups: squared scores [runs · I, cols] of gate and up, apart or as one matrix; scaled in place, as is down.
        down: squared scores [rows, I].
        config: the pattern.
        sweeps: rounds of trial swaps; None for as many as `WORK` allows.

    Returns:
        int64 [I]: which feature comes first, second and so on.
    """
    _to_shares_(ups)
    _to_shares_([down])
    features = down.shape[1]
    orders = list(_sorted_orders(_strength(ups, down), config))
    start = max(orders, key=lambda order: kept_share(ups, down, order, config))  # of equal ones the first: as it is
    if sweeps is None:
        sweeps = min(SWEEPS, max(LEAST_SWEEPS, WORK // down.numel()))
    unit = math.lcm(config.m * config.group, config.vector, 4)
    if features % unit:
        return start
    swapped = _swapped(start, _worth(ups, features, config), down, config, unit, sweeps)
    return max((start, swapped), key=lambda order: kept_share(ups, down, order, config))


def kept_share(ups: list[Tensor], down: Tensor, order: Tensor, config: SparsityConfig) -> float:
    """What the best masks keep of all matrices with their features in an order, exactly."""
    matrices = [Matrix(up, row_index=runs_of(order, len(up))) for up in ups] + [Matrix(down, col_index=order)]
    parts = (matrix.rows(part) for matrix in matrices for part in row_slices(*matrix.shape, config.m * config.group))
    return sum(float(part[best_mask(part, config)].double().sum()) for part in parts)


def _to_shares_(matrices: list[Tensor]) -> None:
    """Scores as shares of their common sum, so that what goes into features weighs as much as what comes out."""
    parts = [matrix[part] for matrix in matrices for part in row_slices(*matrix.shape)]
    total = torch.stack([part.double().sum() for part in parts]).sum().clamp(min=torch.finfo(torch.float32).tiny)
    for part in parts:
        part.copy_(part.double() / total)


def _strength(ups: list[Tensor], down: Tensor) -> Tensor:
    """[I]: the share of each feature in all scores."""
    features = down.shape[1]
    return sum((up.sum(1).view(-1, features).sum(0) for up in ups), down.sum(0))


def _sorted_orders(strength: Tensor, config: SparsityConfig) -> Iterator[Tensor]:
    """As it is; and cut by strength into 2, 4 or m classes, one of each in turn."""
    features = len(strength)
    yield torch.arange(features, device=strength.device)
    ranked = strength.argsort(descending=True, stable=True)
    for classes in sorted({2, 4, config.m} - {1}):
        depth = -(-features // classes)
        places = torch.arange(depth * classes, device=strength.device).view(classes, depth).T.reshape(-1)
        yield ranked[places[places < features]]


def _worth(ups: list[Tensor], features: int, config: SparsityConfig) -> Tensor:
    """[I, V]: what is kept of a feature's rows inside each vector, over all matrices; no order of rows changes it."""
    worth = []
    for up in ups:
        kept = torch.cat([_kept_of_vectors(up[part], config) for part in row_slices(*up.shape)])
        worth += list(kept.split(features))
    return torch.cat(worth, dim=1)


def _kept_of_vectors(scores: Tensor, config: SparsityConfig) -> Tensor:
    """[rows, vectors]: what is kept inside each vector of each row."""
    single = SparsityConfig(1, 1, config.vector)
    blocks = cut(padded(scores, single, fill=PADDING), single)
    kept = (blocks * best_inner(blocks, config)).clamp(min=0)
    return kept.sum(-1).reshape(len(scores), -1)


def _units(worth: Tensor, down: Tensor, order: Tensor, config: SparsityConfig, unit: int) -> Tensor:
    """[units]: what is kept of each run of ``unit`` features, in an order."""
    of_rows = worth[order].view(-1, config.group, config.m, worth.shape[1]).sum(1)
    kept_rows = of_rows.topk(config.n, dim=1).values.sum((1, 2)).view(-1, unit // (config.m * config.group)).sum(1)
    ordered = Matrix(down, col_index=order)
    per_vector = torch.cat([_of_vectors(ordered.rows(part), config) for part in row_slices(*ordered.shape)])
    whole = -len(per_vector) % (config.m * config.group)
    of_columns = F.pad(per_vector, (0, 0, 0, whole)).unflatten(0, (-1, config.group, config.m)).sum(1)
    kept_columns = of_columns.topk(config.n, dim=1).values.sum((0, 1)).view(-1, unit // config.vector).sum(1)
    kept: Tensor = kept_rows + kept_columns
    return kept


def _of_vectors(scores: Tensor, config: SparsityConfig) -> Tensor:
    """The same of scores whose columns are whole vectors; faster."""
    if config.inner == "2:4":
        scores = scores.unflatten(1, (-1, 4)).topk(2, dim=2).values.flatten(1)
    per_vector = config.vector // 2 if config.inner == "2:4" else config.vector
    kept: Tensor = scores.unflatten(1, (-1, per_vector)).sum(2)
    return kept


def _swapped(order: Tensor, worth: Tensor, down: Tensor, config: SparsityConfig, unit: int, sweeps: int) -> Tensor:
    """The order after rounds of trial swaps, each between two units of features or inside of one."""
    generator = torch.Generator().manual_seed(0)
    units = len(order) // unit
    kept = _units(worth, down, order, config, unit)
    for sweep in range(sweeps):
        one, other = (side.to(order.device) for side in _pairs(units, sweep % 2 == 1 or units == 1, generator))
        first, second = (
            side * unit + torch.randint(unit, (len(side),), generator=generator).to(order.device)
            for side in (one, other)
        )
        trial = order.clone()
        trial[first], trial[second] = order[second], order[first]
        found = _units(worth, down, trial, config, unit)
        gain = (found - kept)[one] + (found - kept)[other]
        good = gain > 0
        order = order.clone()
        order[first[good]], order[second[good]] = trial[first[good]], trial[second[good]]
        changed = torch.cat([one[good], other[good]])
        kept[changed] = found[changed]
    return order


def _pairs(units: int, inside: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Units to swap between, no unit in two pairs; or each with itself."""
    if inside:
        return torch.arange(units), torch.arange(units)
    shuffled = torch.randperm(units, generator=generator)
    half = units // 2
    return shuffled[:half], shuffled[half : 2 * half]
