"""Which form of the experts to lower to: rows sorted by expert, or weights gathered for every slot."""

from __future__ import annotations

import torch

CALL_SECONDS = 60e-6
GATHERED_BYTES_PER_SECOND = 17e9
SORTED_BYTES_PER_SECOND = 15e9
"""Measured on a two-core CPU (benchmarks/results/block.json); only their ratios matter here."""
KERNEL_SECONDS = 100e-6
KERNEL_BYTES_PER_SECOND = 21e9
"""Of one kernel for the whole block: the call, and the weights of one slot; measured against gathered weights."""


def prefers_gathered(
    family: str, x: torch.Tensor, expert_ids: torch.Tensor, weight_bytes: int, experts: int, kernel: bool = False
) -> bool:  # fmt: skip
    """Whether to gather weights for every slot.

    Only for a block that did so itself, so that the choice can never cost more than what it replaces; only on CPU,
    where Inductor fuses the gather into the products; only without gradients, whose gather would scatter into all
    weights; and only for a static number of tokens, since a symbolic one may become large.

    Args:
        family: the pattern that the block matched.
        x: tokens, [T, H].
        expert_ids: [T, K].
        weight_bytes: bytes of one expert's weights.
        experts: E.
        kernel: whether one kernel could compute the block instead; it wins unless the weights are small.
    """
    tokens, top_k = expert_ids.shape
    if family != "gathered" or x.device.type != "cpu" or torch.is_grad_enabled() or not isinstance(tokens, int):
        return False
    expected_experts = experts * (1 - (1 - min(top_k / experts, 1)) ** tokens)
    gathered = tokens * top_k * weight_bytes / GATHERED_BYTES_PER_SECOND
    if kernel and gathered > tokens * top_k * weight_bytes / KERNEL_BYTES_PER_SECOND + KERNEL_SECONDS:
        return False
    by_expert = expected_experts * (weight_bytes / SORTED_BYTES_PER_SECOND + CALL_SECONDS)
    return gathered < by_expert
