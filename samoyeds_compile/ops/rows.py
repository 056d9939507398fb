"""Moving rows between token order and slot order, with derivatives that gather instead of scattering.

Plain ATen inside `torch.autograd.Function`s: tracing looks through them, so Inductor fuses each move with its
neighbours, and no backward needs atomics: what one direction gathers, the other gathers back through the inverse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _owned(slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, K, 1]: whether the slot belongs to an expert; rows of the others are undefined and must not be read."""
    return (slot_TK < offsets_E[-1]).unsqueeze(-1)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
        return x_TH[order_S // max(slot_TK.shape[1], 1)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, _, slot_TK, offsets_E = inputs
        ctx.save_for_backward(slot_TK, offsets_E)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None, None]:
        slot_TK, offsets_E = ctx.saved_tensors
        grad_TKH = torch.where(_owned(slot_TK, offsets_E), grad_SH[slot_TK], 0)
        return grad_TKH.sum(1), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(y_SH: Tensor, weights_TK: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
        weighted_TKH = y_SH[slot_TK] * weights_TK.unsqueeze(-1)
        return torch.where(_owned(slot_TK, offsets_E), weighted_TKH, 0).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y_SH, weights_TK, order_S, slot_TK, offsets_E = ctx.saved_tensors
        grad_y = grad_weights = None
        if ctx.needs_input_grad[0]:
            token_S = order_S // max(slot_TK.shape[1], 1)
            grad_y = (grad_TH[token_S] * weights_TK.reshape(-1)[order_S].unsqueeze(-1)).to(y_SH.dtype)
        if ctx.needs_input_grad[1]:
            product_TKH = grad_TH.unsqueeze(1) * y_SH[slot_TK]
            grad_weights = torch.where(_owned(slot_TK, offsets_E), product_TKH, 0).sum(-1).to(weights_TK.dtype)
        return grad_y, grad_weights, None, None, None


class _ExpertRows(torch.autograd.Function):
    @staticmethod
    def forward(table_EO: Tensor, expert_S: Tensor, offsets_E: Tensor) -> Tensor:
        return table_EO[expert_S.clamp(max=table_EO.shape[0] - 1)]  # nobody's rows may read any bias

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, None, None]:
        (offsets_E,) = ctx.saved_tensors
        ones = grad_SO.new_ones(grad_SO.shape[0], 16 // grad_SO.element_size())  # the narrowest aligned matrix
        return torch.ops.samoyeds.expert_outer(ones, grad_SO, offsets_E, False)[..., 0], None, None


def dispatch(x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[S, H]: the token of every slot, in slot order."""
    return _Dispatch.apply(x_TH, order_S, slot_TK, offsets_E)  # type: ignore[no-any-return, no-untyped-call]


def combine(y_SH: Tensor, weights_TK: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, H]: each token's rows times its routing weights, summed in slot order, in the dtype they promote to."""
    out = _Combine.apply(y_SH, weights_TK, order_S, slot_TK, offsets_E)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def expert_rows(table_EO: Tensor, expert_S: Tensor, offsets_E: Tensor) -> Tensor:
    """[S, O]: the row of each slot's expert (a bias)."""
    return _ExpertRows.apply(table_EO, expert_S, offsets_E)  # type: ignore[no-any-return, no-untyped-call]
