"""Dense masters with masks in place of packed weights, for training that recovers quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.layout import StorageLayout
from samoyeds_compile.sparsity.projections import Projection
from samoyeds_compile.sparsity.prune import Pruned
from samoyeds_compile.sparsity.training.prepare import make_trainable_


@dataclass(frozen=True)
class Masters:
    """What a parameter is to hold, and its mask, both as stored.

    Attributes:
        name: of the parameter in the model.
        values: dense; what is pruned keeps its value, and may come back.
        mask: boolean.
        layout: of the storage.
    """

    name: str
    values: Tensor
    mask: Tensor
    layout: StorageLayout

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.values.nbytes + self.mask.nbytes


def masters(projection: Projection, weights: Sequence[Tensor], pruned: Sequence[Pruned]) -> Masters:
    """Of the matrices of all experts, before and after pruning."""
    layout = projection.layout

    def stored(matrices: list[Tensor]) -> Tensor:
        return layout.to_stored(torch.stack(matrices) if projection.stacked else matrices[0]).contiguous()

    values = [torch.where(p.mask, p.weight, w) for w, p in zip(weights, pruned, strict=True)]
    return Masters(projection.name, stored(values), stored([p.mask for p in pruned]), layout)


@torch.no_grad()
def install_masters(model: nn.Module, found: Sequence[Masters], config: SparsityConfig) -> None:
    """Add the masks, which is done to all of them or fails, and write the values into the model's own parameters."""
    parameters = [model.get_parameter(each.name) for each in found]
    masks, layouts = {m.name: m.mask for m in found}, {m.name: m.layout for m in found}
    make_trainable_(model, masks, config, layouts=layouts)
    for parameter, each in zip(parameters, found, strict=True):
        parameter.copy_(each.values)
