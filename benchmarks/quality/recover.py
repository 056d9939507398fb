"""Training after pruning of what `sparsify_` does not make: the dense model, and patterns of others."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from examples.small_lm.recover import train_on


def recovered_dense(model: nn.Module, inputs: list[Tensor]) -> nn.Module:
    """The dense model after the same extra steps."""
    found = copy.deepcopy(model)
    train_on(found, inputs)
    return found.eval()


def recovered_peer(model: nn.Module, masks: dict[str, Tensor], inputs: list[Tensor]) -> nn.Module:
    """A copy with masks of another pattern, held by zeroing weights and gradients: what fixed masks do."""
    found = copy.deepcopy(model)
    held = [(found.get_parameter(name), mask) for name, mask in masks.items()]

    @torch.no_grad()
    def before_step() -> None:
        for parameter, mask in held:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    with torch.no_grad():
        for parameter, mask in held:
            parameter.mul_(mask)
    train_on(found, inputs, before_step)
    assert all(not parameter.detach()[~mask].any() for parameter, mask in held)
    return found.eval()
