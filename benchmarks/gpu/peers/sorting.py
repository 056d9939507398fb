"""Rows in the order of experts, by plain torch, for peers that only multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.inputs import Inputs


@dataclass(frozen=True)
class Sorted:
    """Slots sorted by expert.

    Attributes:
        order_S: the place of each in [T, K].
        counts_E: how many each expert has.
    """

    order_S: Tensor
    counts_E: Tensor


def sort(inputs: Inputs, experts: int) -> Sorted:
    """Sort the slots; nothing waits for the device."""
    flat = inputs.ids_TK.flatten()
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    return Sorted(order, counts.scatter_add_(0, flat, torch.ones_like(flat)))


def padded_rows(inputs: Inputs, experts: int, multiple: int) -> tuple[Tensor, list[int]]:
    """Tokens in the order of experts, each expert's rows padded with zeros, and where each expert ends."""
    order = sort(inputs, experts)
    rows = inputs.x_TH[order.order_S // inputs.ids_TK.shape[1]]
    parts = list(rows.split(order.counts_E.tolist()))
    parts = [torch.cat([p, p.new_zeros(-p.shape[0] % multiple, p.shape[1])]) for p in parts]
    ends = torch.tensor([p.shape[0] for p in parts]).cumsum(0).tolist()
    return torch.cat(parts), ends
