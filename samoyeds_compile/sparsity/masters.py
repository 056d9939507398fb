"""Dense masters with masks in place of packed weights, for training that recovers quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samoyeds_compile.sparsity.by_rows import row_slices
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.install import Packing, packed
from samoyeds_compile.sparsity.layout import StorageLayout
from samoyeds_compile.sparsity.projections import Projection
from samoyeds_compile.sparsity.prune import PrunedRows
from samoyeds_compile.sparsity.training.prepare import make_trainable_


@dataclass(frozen=True)
class Masters:
    """What a parameter is to hold, and its mask.

    Attributes:
        projection: whose parameter.
        values: [E, rows, cols], dense; what is pruned keeps its value, and may come back.
        mask: boolean, like ``values``.
    """

    projection: Projection
    values: Tensor
    mask: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.values.nbytes + self.mask.nbytes

    @property
    def layout(self) -> StorageLayout:
        """Of the parameter."""
        return self.projection.layout

    def write(self, expert: int, rows: PrunedRows) -> None:
        """Keep some rows of an expert."""
        self.values[expert, rows.part] = torch.where(rows.mask, rows.weight, rows.dense)
        self.mask[expert, rows.part] = rows.mask

    def packing(self, config: SparsityConfig) -> Packing:
        """The same weights, packed."""
        made, (rows, cols) = packed(self.projection, config), self.projection.shape
        for expert in range(self.projection.experts):
            for part in row_slices(rows, cols, config.m * config.group):
                weight = torch.where(self.mask[expert, part], self.values[expert, part], 0)
                made.write_rows(expert, part, weight)
        return made

    def stored(self, matrices: Tensor) -> Tensor:
        """Values or mask as the parameter stores them."""
        return self.layout.to_stored(matrices if self.projection.stacked else matrices[0]).contiguous()


def masters(projection: Projection) -> Masters:
    """Room for the masters of a parameter."""
    values = torch.empty(
        projection.experts, *projection.shape, dtype=projection.parameter.dtype, device=projection.parameter.device
    )
    return Masters(projection, values, torch.empty_like(values, dtype=torch.bool))


@torch.no_grad()
def install_masters(model: nn.Module, found: Sequence[Masters], config: SparsityConfig) -> None:
    """Add the masks, which is done to all of them or fails, and write the values into the model's own parameters."""
    parameters = [each.projection.parameter for each in found]
    masks = {m.projection.name: m.stored(m.mask) for m in found}
    make_trainable_(model, masks, config, layouts={m.projection.name: m.layout for m in found})
    for parameter, each in zip(parameters, found, strict=True):
        parameter.copy_(each.stored(each.values))
