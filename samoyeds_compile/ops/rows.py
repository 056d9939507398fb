"""Moving rows between token order and slot order, with derivatives that gather instead of scattering.

Plain ATen inside `torch.autograd.Function`s: tracing looks through them, so Inductor fuses each move with its
neighbours, and no backward needs atomics: what one direction gathers, the other gathers back through the inverse.

`dispatch` and `collect` are each other's derivatives. So are `dispatch_weighted`, `combine` and `_dots`: the three are
the partial derivatives of ``sum over t, k of weights[t, k] * <rows[slot[t, k]], tokens[t]>``. All orders of derivatives
are therefore gathers. Rows of slots that belong to nobody are undefined; whatever reads rows masks them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _owned(slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, K, 1]: whether the slot belongs to an expert; rows of the others are undefined and must not be read."""
    return (slot_TK < offsets_E[-1]).unsqueeze(-1)


def tokens_of(order_S: Tensor, slot_TK: Tensor) -> Tensor:
    """[S]: the token of every slot."""
    return order_S // max(slot_TK.shape[1], 1)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
        return x_TH[tokens_of(order_S, slot_TK)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor, None, None, None]:
        return collect(grad_SH, *ctx.saved_tensors), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(y_SH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
        return torch.where(_owned(slot_TK, offsets_E), y_SH[slot_TK], 0).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor, None, None, None]:
        return dispatch(grad_TH, *ctx.saved_tensors), None, None, None


class _DispatchWeighted(torch.autograd.Function):
    @staticmethod
    def forward(x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
        return x_TH[tokens_of(order_S, slot_TK)] * weights_TK.reshape(-1)[order_S].unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_SH: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_TH, weights_TK, *plan = ctx.saved_tensors
        needs_x, needs_weights = ctx.needs_input_grad[:2]
        grad_x = combine(grad_SH, weights_TK, *plan).to(x_TH.dtype) if needs_x else None
        grad_weights = _dots(grad_SH, x_TH, *plan).to(weights_TK.dtype) if needs_weights else None
        return grad_x, grad_weights, None, None, None


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
        y_SH, weights_TK, *plan = ctx.saved_tensors
        needs_y, needs_weights = ctx.needs_input_grad[:2]
        grad_y = dispatch_weighted(grad_TH, weights_TK, *plan).to(y_SH.dtype) if needs_y else None
        grad_weights = _dots(y_SH, grad_TH, *plan).to(weights_TK.dtype) if needs_weights else None
        return grad_y, grad_weights, None, None, None


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(rows_SH: Tensor, tokens_TH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
        product_TKH = tokens_TH.unsqueeze(1) * rows_SH[slot_TK]
        return torch.where(_owned(slot_TK, offsets_E), product_TKH, 0).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows_SH, tokens_TH, *plan = ctx.saved_tensors
        needs_rows, needs_tokens = ctx.needs_input_grad[:2]
        grad_rows = dispatch_weighted(tokens_TH, grad_TK, *plan).to(rows_SH.dtype) if needs_rows else None
        grad_tokens = combine(rows_SH, grad_TK, *plan).to(tokens_TH.dtype) if needs_tokens else None
        return grad_rows, grad_tokens, None, None, None


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
        return sum_by_expert(grad_SO, offsets_E, grad_SO.new_ones(grad_SO.shape[0], 1)), None, None


def dispatch(x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[S, H]: the token of every slot, in slot order."""
    return _Dispatch.apply(x_TH, order_S, slot_TK, offsets_E)  # type: ignore[no-any-return, no-untyped-call]


def dispatch_weighted(x_TH: Tensor, weights_TK: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[S, H]: the token of every slot times the slot's routing weight, in the dtype they promote to."""
    out = _DispatchWeighted.apply(x_TH, weights_TK, order_S, slot_TK, offsets_E)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def collect(y_SH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, H]: each token's rows, summed in slot order."""
    return _Collect.apply(y_SH, order_S, slot_TK, offsets_E)  # type: ignore[no-any-return, no-untyped-call]


def combine(y_SH: Tensor, weights_TK: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, H]: each token's rows times its routing weights, summed in slot order, in the dtype they promote to."""
    out = _Combine.apply(y_SH, weights_TK, order_S, slot_TK, offsets_E)  # type: ignore[no-untyped-call]
    return out  # type: ignore[no-any-return]


def _dots(rows_SH: Tensor, tokens_TH: Tensor, order_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, K]: the scalar product of each token with each of its rows, in the dtype they promote to."""
    return _Dots.apply(rows_SH, tokens_TH, order_S, slot_TK, offsets_E)  # type: ignore[no-any-return, no-untyped-call]


def expert_rows(table_EO: Tensor, expert_S: Tensor, offsets_E: Tensor) -> Tensor:
    """[S, O]: the row of each slot's expert (a bias)."""
    return _ExpertRows.apply(table_EO, expert_S, offsets_E)  # type: ignore[no-any-return, no-untyped-call]


def sum_by_expert(rows_SO: Tensor, offsets_E: Tensor, weight_S1: Tensor) -> Tensor:
    """[E, O]: the weighted sum of each expert's rows."""
    narrowest = 16 // rows_SO.element_size()  # of the matrices that are aligned
    weights = weight_S1.to(rows_SO.dtype).expand(-1, narrowest)
    return torch.ops.samoyeds.expert_outer(weights, rows_SO, offsets_E, False)[..., 0]  # type: ignore[no-any-return]


def slot_weights(weights_TK: Tensor, order_S: Tensor, offsets_E: Tensor) -> Tensor:
    """[S]: the routing weight of every slot, 0 where it belongs to nobody."""
    owned_S = torch.arange(order_S.shape[0], device=order_S.device) < offsets_E[-1]
    return torch.where(owned_S, weights_TK.reshape(-1)[order_S], 0)


def of_slots(values_S: Tensor, slot_TK: Tensor, offsets_E: Tensor) -> Tensor:
    """[T, K]: the value of each token's slots, 0 where they belong to nobody."""
    return torch.where(slot_TK < offsets_E[-1], values_S[slot_TK], 0)
