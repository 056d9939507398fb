"""``samoyeds::route``: which slots each expert computes, and where each token finds its results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from samoyeds_compile.ops.library import bad_operand, define_opaque

INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
NO_SIGN = 2**63 - 1
"""Without its sign bit a negative id becomes a huge one, and is sorted to the end with the other sentinels."""


class Plan(NamedTuple):
    """Slots sorted by expert; slots of a token whose id is no expert come last and belong to nobody.

    Attributes:
        order_S: int64; position ``t * K + k`` of each sorted slot in ``expert_ids`` made flat.
        slot_TK: int64; the inverse: the sorted slot of (t, k).
        expert_S: int64; the expert of each sorted slot, E or more for those that belong to nobody.
        offsets_E: int32; expert e owns sorted slots ``offsets_E[e - 1]`` (0 for e = 0) to ``offsets_E[e]``.
    """

    order_S: Tensor
    slot_TK: Tensor
    expert_S: Tensor
    offsets_E: Tensor


def route(expert_ids_TK: Tensor, num_experts: int) -> Plan:
    """Sort slots by expert, stably, on the device of the ids and without a host synchronisation.

    Args:
        expert_ids_TK: any integer dtype; an id outside ``0..E-1`` (an expert-parallel sentinel) is nobody's.
        num_experts: E.

    Raises:
        OperandError: the ids are not a two-dimensional integer tensor, or E is not positive.
    """
    _check(expert_ids_TK, num_experts)
    flat_S = expert_ids_TK.reshape(-1).to(torch.int64) & NO_SIGN
    expert_S, order_S = torch.sort(flat_S, stable=True)
    positions_S = torch.arange(order_S.shape[0], device=order_S.device)
    slot_S = torch.empty_like(order_S).scatter_(0, order_S, positions_S)
    experts_E = torch.arange(num_experts, device=order_S.device)
    offsets_E = torch.searchsorted(expert_S, experts_E, right=True, out_int32=True)
    return Plan(order_S, slot_S.view(expert_ids_TK.shape), expert_S, offsets_E)


def _check(expert_ids_TK: Tensor, num_experts: int) -> None:
    dtype, rank = expert_ids_TK.dtype, expert_ids_TK.dim()
    if rank != 2 or dtype not in INTEGERS:
        raise bad_operand("route", "expert_ids", f"is {dtype} of rank {rank}", "pass integers of shape [T, K]")
    if num_experts <= 0:
        raise bad_operand("route", "num_experts", f"is {num_experts}", "pass the number of experts")


def _fake(expert_ids_TK: Tensor, num_experts: int) -> Plan:
    _check(expert_ids_TK, num_experts)
    index_S = expert_ids_TK.new_empty(expert_ids_TK.numel(), dtype=torch.int64)
    slot_TK = expert_ids_TK.new_empty(expert_ids_TK.shape, dtype=torch.int64)
    offsets_E = expert_ids_TK.new_empty(num_experts, dtype=torch.int32)
    return Plan(index_S, slot_TK, torch.empty_like(index_S), offsets_E)


define_opaque("route(Tensor expert_ids, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)", route, _fake)
