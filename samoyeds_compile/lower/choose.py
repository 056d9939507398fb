"""Which form of the experts to lower to: rows sorted by expert, or weights gathered for every slot."""

from __future__ import annotations

import torch

from samoyeds_compile.layout.machine import Machine, here


def prefers_gathered(
    family: str, x: torch.Tensor, expert_ids: torch.Tensor, weight_bytes: int, experts: int, kernel: bool = False,
    machine: Machine | None = None,
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
        machine: the constants of costs; by default those of this machine.
    """
    tokens, top_k = expert_ids.shape
    if family != "gathered" or x.device.type != "cpu" or torch.is_grad_enabled() or not isinstance(tokens, int):
        return False
    machine = machine or here()
    slot_bytes = tokens * top_k * weight_bytes
    if kernel and slot_bytes * machine.gathered > slot_bytes * machine.streamed + machine.start:
        return False
    expected_experts = experts * (1 - (1 - min(top_k / experts, 1)) ** tokens)
    by_expert = expected_experts * (weight_bytes * machine.sorted + machine.call)
    return slot_bytes * machine.gathered < by_expert
