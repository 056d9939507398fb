"""Matrices of all experts one below the other, [E · I, H] three times: dbrx.

``w1`` is the gate, ``v1`` what is gated, and ``w2`` the last projection, stored [in, out]. A child module holds them,
and takes those of one expert with its tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from samoyeds_compile.sparsity.experts.stacks import ROUTED, arguments_of, by_ids, gated
from samoyeds_compile.sparsity.projections import Block, Projection, Stack, path

WEIGHTS = {"w1": "up", "v1": "up", "w2": "down"}
"""Roles, in the order in which they run."""


def flat(name: str, module: Any) -> list[Block]:
    """The block of a module that takes tokens by ids and has such a child."""
    child = getattr(module, "mlp", None)
    experts = getattr(module, "num_experts", None)
    if not isinstance(experts, int) or not _holds_weights(child, experts) or arguments_of(module) != ROUTED:
        return []
    assert isinstance(child, nn.Module)
    projections = tuple(
        Projection(
            path(name, "mlp", attribute), child, attribute, role, stacked=True, flat=experts, transposed=role == "down"
        )
        for attribute, role in WEIGHTS.items()
    )
    stack = Stack(by_ids(module, experts), gated(child.activation_fn))
    return [Block(name, module, name, projections, frozenset(), stack)]


def _holds_weights(child: Any, experts: int) -> bool:
    if not isinstance(child, nn.Module) or not hasattr(child, "activation_fn"):
        return False
    if arguments_of(child) != ["x", *(f"expert_{attribute}" for attribute in WEIGHTS)]:
        return False
    held = dict(child.named_parameters(recurse=False))
    return held.keys() == WEIGHTS.keys() and len({p.shape for p in held.values()}) == 1 and _fits(held["w1"], experts)


def _fits(weight: Tensor, experts: int) -> bool:
    return weight.dim() == 2 and experts > 0 and weight.shape[0] % experts == 0
