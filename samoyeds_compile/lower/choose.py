"""Which form of the experts to lower to: rows sorted by expert, or weights gathered for every slot."""

from __future__ import annotations

import torch

CALL_SECONDS = 60e-6
GATHERED_BYTES_PER_SECOND = 17e9
SORTED_BYTES_PER_SECOND = 15e9
"""Measured on a two-core CPU (benchmarks/results/block.json); only their ratios matter here."""


def prefers_gathered(family: str, x: torch.Tensor, expert_ids: torch.Tensor, weight_bytes: int, experts: int) -> bool:
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
    """
    tokens, top_k = expert_ids.shape
    if family != "gathered" or x.device.type != "cpu" or torch.is_grad_enabled() or not isinstance(tokens, int):
        return False
    expected_experts = experts * (1 - (1 - min(top_k / experts, 1)) ** tokens)
    gathered = tokens * top_k * weight_bytes / GATHERED_BYTES_PER_SECOND
    by_expert = expected_experts * (weight_bytes / SORTED_BYTES_PER_SECOND + CALL_SECONDS)
    return gathered < by_expert
