"""Put pruned weights into a model, and take them out again: the one place that knows how they are held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.experts import Projection
from samoyeds_compile.sparsity.pack import pack


@dataclass(frozen=True)
class Replacement:
    """A parameter that is to take the place of another."""

    owner: nn.Module
    attribute: str
    parameter: nn.Parameter


def packed(projection: Projection, pruned: Tensor, config: SparsityConfig) -> tuple[nn.Parameter, int]:
    """The parameter that holds a pruned weight, and its bytes.

    Args:
        projection: whose weight.
        pruned: the weight, stored like the parameter.
        config: the pattern that it has.
    """
    weight = pruned if projection.stacked else pruned[None]
    matrices = torch.stack(
        [projection.matrix(weight[0] if not projection.stacked else weight, e) for e in range(len(weight))]
    )
    return nn.Parameter(pruned, requires_grad=False), pack(matrices, config, projection.name).nbytes


def install(replacements: list[Replacement]) -> None:
    """Replace parameters, all of them."""
    for replacement in replacements:
        setattr(replacement.owner, replacement.attribute, replacement.parameter)


def densify_(model: nn.Module) -> int:
    """Replace the packed weights of a model by dense ones with the same values; how many there were."""
    raise NotImplementedError
