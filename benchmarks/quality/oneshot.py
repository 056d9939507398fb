"""Prune a copy of a model, by `sparsify_` or to the pattern of a peer, without training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.quality.peers import Peer
from samoyeds_compile import SparsityConfig, sparsify_
from samoyeds_compile.sparsity.by_rows import Matrix
from samoyeds_compile.sparsity.calibration import collect
from samoyeds_compile.sparsity.experts import find_blocks
from samoyeds_compile.sparsity.install import densify_
from samoyeds_compile.sparsity.masters import Masters
from samoyeds_compile.sparsity.prune import METHODS, squared_scores
from samoyeds_compile.sparsity.reconstruct import holder, reconstruct, record
from samoyeds_compile.sparsity.stats import Wanted


def pruned(
    model: nn.Module,
    config: SparsityConfig,
    method: str,
    calibration: list[Tensor],
    permute: bool,
    refine: bool = False,
    reconstruct: int = 0,
) -> nn.Module:
    """A dense copy with the values that `sparsify_` leaves."""
    found = copy.deepcopy(model)
    given = None if method == "magnitude" else calibration
    how = {"permute": permute, "refine": refine, "reconstruct": reconstruct}
    sparsify_(found, config, method=method, calibration=given, progress=False, **how)
    densify_(found)
    return found


@torch.no_grad()
def peer_masks(model: nn.Module, peer: Peer, method: str, calibration: list[Tensor]) -> dict[str, Tensor]:
    """Masks of expert stacks for another pattern, chosen by the same squared scores."""
    how, blocks = METHODS[method], find_blocks(model)
    stats = collect(model, blocks, calibration, Wanted(how.routed, sample=False)) if how.calibrated else {}
    return {
        p.name: torch.stack(
            [peer.mask(squared_scores(Matrix.of(p, e), stats.get(p.name), e, how)) for e in range(p.experts)]
        )
        for block in blocks for p in block.projections
    }  # fmt: skip


@torch.no_grad()
def masked(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A dense copy with masks applied."""
    found = copy.deepcopy(model)
    for name, mask in masks.items():
        found.get_parameter(name).mul_(mask)
    return found


def reconstructed(model: nn.Module, masks: dict[str, Tensor], calibration: list[Tensor], steps: int) -> nn.Module:
    """A dense copy with masks of another pattern applied, fitted as ``sparsify_(reconstruct=steps)`` fits its own."""
    found = copy.deepcopy(model)
    for block in find_blocks(found):
        name, module = holder(block, found)
        calls = record(found, [module], calibration, lambda: None)[module]
        made = [Masters(p, p.stored.clone(), masks[p.name]) for p in block.projections]
        reconstruct(name, module, made, [], calls, steps)
        for each in made:
            each.projection.parameter.data.copy_(torch.where(each.mask, each.values, 0))
    return found
