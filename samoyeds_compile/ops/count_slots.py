"""``samoyeds::count_slots``: add to a tensor of counts how many slots each expert gets."""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_compile.ops.library import bad_operand, define_opaque
from samoyeds_compile.ops.route import INTEGERS


def count_slots(counts_E: Tensor, expert_ids_TK: Tensor) -> None:
    """``counts[e] += number of (t, k) with expert_ids[t, k] == e``, on the device and without a host synchronisation.

    Args:
        counts_E: int64, written to.
        expert_ids_TK: any integer dtype; an id outside ``0..E-1`` (an expert-parallel sentinel) is not counted.

    Raises:
        OperandError: the counts are not int64 of rank 1, or the ids are no integers of rank 2.
    """
    _check(counts_E, expert_ids_TK)
    ids_S = expert_ids_TK.reshape(-1).to(torch.int64)
    exists_S = (ids_S >= 0) & (ids_S < counts_E.shape[0])
    counts_E.scatter_add_(0, ids_S * exists_S, exists_S.to(torch.int64))  # integers: the same in any order


def _check(counts_E: Tensor, expert_ids_TK: Tensor) -> None:
    if counts_E.dtype != torch.int64 or counts_E.dim() != 1:
        reason = f"is {counts_E.dtype} of rank {counts_E.dim()}"
        raise bad_operand("count_slots", "counts", reason, "pass int64 of shape [E]")
    if expert_ids_TK.dtype not in INTEGERS or expert_ids_TK.dim() != 2:
        reason = f"is {expert_ids_TK.dtype} of rank {expert_ids_TK.dim()}"
        raise bad_operand("count_slots", "expert_ids", reason, "pass integers of shape [T, K]")


define_opaque("count_slots(Tensor(a!) counts, Tensor expert_ids) -> ()", count_slots, _check)
