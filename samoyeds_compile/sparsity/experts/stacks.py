"""What several forms of stacks share: how arguments are called, how tokens are told by ids, and how experts gate."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from samoyeds_compile.sparsity.projections import Between, Projection, Tokens, path

ROUTED = ["hidden_states", "top_k_index", "top_k_weights"]
"""What transformers calls the arguments of experts that get tokens by ids."""


def arguments_of(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def by_ids(module: nn.Module, experts: int) -> Tokens:
    """Of a module that takes hidden states [.., H], ids [T, K] and routing weights [T, K], whatever they are called."""
    signature = inspect.signature(type(module).forward)

    def tokens(*args: Any, **kwargs: Any) -> Iterator[tuple[int, Tensor, Tensor]]:
        x, ids, weights = list(signature.bind(module, *args, **kwargs).arguments.values())[1:4]
        x, ids, weights = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, ids, weights))
        for expert, slots in enumerate(slots_of_experts(ids, experts)):
            yield expert, x[slots // ids.shape[1]], weights.reshape(-1)[slots]

    return tokens


def slots_of_experts(ids_TK: Tensor, experts: int) -> list[Tensor]:
    """For each expert the positions in the flattened ids where it stands; ids of nobody are left out."""
    ids = ids_TK.reshape(-1)
    order = ids.argsort(stable=True)
    known = (ids >= 0) & (ids < experts)
    order = order[known[order]]
    counts = torch.bincount(ids[known], minlength=experts).tolist()
    return list(order.split(counts))


def gated(activation: Any) -> Between:
    """``activation(gate) * up``, of gate and up as one output [N, 2 I] or as two [N, I]."""

    def between(*outputs: Tensor) -> Tensor:
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return activation(gate) * up  # type: ignore[no-any-return]

    return between


def gate_up_down(name: str, module: nn.Module, transposed: bool) -> tuple[Projection, Projection] | None:
    """``gate_up_proj`` and ``down_proj`` of a module that holds these two stacks, an activation and nothing else.

    Args:
        name: of the module in the model.
        module: any.
        transposed: the stacks must be [E, H, 2 I] and [E, I, H]; otherwise [E, 2 I, H] and [E, H, I].
    """
    held = dict(module.named_parameters(recurse=False))
    gates = hasattr(module, "_apply_gate") or hasattr(module, "act_fn")
    if held.keys() != {"gate_up_proj", "down_proj"} or not gates:
        return None
    up, down = (
        Projection(path(name, attribute), module, attribute, role, stacked=True, transposed=transposed, runs=runs)
        for attribute, role, runs in (("gate_up_proj", "up", 2), ("down_proj", "down", 1))
    )
    if any(p.parameter.dim() != 3 for p in (up, down)) or up.shape != (2 * down.shape[1], down.shape[0]):
        return None
    return up, down


def gate_of(module: Any) -> Between:
    """What a module of `gate_up_down` does between the two."""
    return module._apply_gate if hasattr(module, "_apply_gate") else gated(module.act_fn)
