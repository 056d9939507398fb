"""The second projection with the weighted sum of each token's rows: one function, so that its rows are not kept.

The derivative by a routing weight is the product of a projected row and the gradient of its token, ``<y, g>``. With
``y = W h + b`` that is ``<h, W' g> + <b, g>``, and ``W' g`` is needed anyway, for the derivative by h. So y, [S, H], is
not saved for the backward. All else is plain ATen that tracing looks through: whether h is saved or computed again is
the partitioner's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samoyeds_compile.ops import rows
from samoyeds_compile.ops.expert_up import biased_linear
from samoyeds_compile.ops.operands import is_stack, weight_grads

_FIXED = 8
"""Arguments before the weights, which are any number of tensors."""


class _Saved(NamedTuple):
    h_SI: Tensor
    weights_TK: Tensor
    bias_E: Tensor | None
    order_S: Tensor
    slot_TK: Tensor
    expert_S: Tensor
    offsets_E: Tensor
    down_E: Sequence[Tensor]
    in_out: bool

    def of_slots(self, rows_TH: Tensor) -> Tensor:
        """[S, H]: the row of each slot's token."""
        return rows.dispatch(rows_TH, self.order_S, self.slot_TK, self.offsets_E)

    def weight_S1(self) -> Tensor:
        """The routing weight of every slot, as a column."""
        return rows.slot_weights(self.weights_TK, self.order_S, self.offsets_E).unsqueeze(-1)


class _DownCombine(torch.autograd.Function):
    @staticmethod
    def forward(
        h_SI: Tensor,
        weights_TK: Tensor,
        bias_E: Tensor | None,
        order_S: Tensor,
        slot_TK: Tensor,
        expert_S: Tensor,
        offsets_E: Tensor,
        weight_layout: str,
        *down_E: Tensor,
    ) -> Tensor:
        y_SH = biased_linear(h_SI, down_E, bias_E, expert_S, offsets_E, weight_layout)
        return rows.combine(y_SH, weights_TK, order_S, slot_TK, offsets_E)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.weight_layout = inputs[:_FIXED]
        ctx.save_for_backward(*tensors, *inputs[_FIXED:])

    @staticmethod
    def backward(ctx: Any, grad_TH: Tensor) -> tuple[Tensor | None, ...]:
        h, weights, bias, order, slot, expert, offsets, *down = ctx.saved_tensors
        saved = _Saved(h, weights, bias, order, slot, expert, offsets, down, ctx.weight_layout == "in_out")
        grad_TH = grad_TH.to(saved.h_SI.dtype)
        needs_h, needs_weights, needs_bias, *_ = ctx.needs_input_grad
        grad_h = grad_weights = None
        if needs_h or needs_weights:
            back_SI = torch.ops.samoyeds.token_linear(
                grad_TH, saved.order_S, saved.slot_TK, saved.down_E, saved.offsets_E, not saved.in_out
            )
            grad_h = (back_SI * saved.weight_S1()).to(back_SI.dtype) if needs_h else None
            grad_weights = _grad_weights(saved, grad_TH, back_SI) if needs_weights else None
        grad_bias = _grad_bias(saved, grad_TH) if needs_bias else None
        grads_down = _grads_down(saved, grad_TH, ctx.needs_input_grad[_FIXED:])
        return grad_h, grad_weights, grad_bias, *[None] * 5, *grads_down


def _grad_weights(saved: _Saved, grad_TH: Tensor, back_SI: Tensor) -> Tensor:
    dtype = torch.promote_types(saved.h_SI.dtype, saved.weights_TK.dtype)
    dots_S = (back_SI.to(dtype) * saved.h_SI).sum(-1)
    if saved.bias_E is not None:
        bias_SH = rows.expert_rows(saved.bias_E, saved.expert_S, saved.offsets_E)
        dots_S = dots_S + (saved.of_slots(grad_TH).to(dtype) * bias_SH).sum(-1)
    return rows.of_slots(dots_S, saved.slot_TK, saved.offsets_E).to(saved.weights_TK.dtype)


def _grad_bias(saved: _Saved, grad_TH: Tensor) -> Tensor:
    assert saved.bias_E is not None
    sums_EH = rows.sum_by_expert(saved.of_slots(grad_TH), saved.offsets_E, saved.weight_S1())
    return sums_EH.sum_to_size(saved.bias_E.shape).to(saved.bias_E.dtype)


def _grads_down(saved: _Saved, grad_TH: Tensor, needed: Sequence[bool]) -> Sequence[Tensor | None]:
    if not any(needed):
        return [None] * len(needed)
    weighted_SI = (saved.h_SI * saved.weight_S1()).to(grad_TH.dtype)
    outer = torch.ops.samoyeds.token_outer(
        grad_TH, saved.order_S, saved.slot_TK, weighted_SI, saved.offsets_E, not saved.in_out
    )
    return weight_grads(outer.to(saved.down_E[0].dtype), is_stack(saved.down_E), needed)


def down_combine(
    h_SI: Tensor,
    order_S: Tensor,
    slot_TK: Tensor,
    expert_S: Tensor,
    offsets_E: Tensor,
    down_E: Sequence[Tensor],
    down_bias_E: Tensor | None,
    expert_weights_TK: Tensor,
    weight_layout: str,
) -> Tensor:
    """[T, H]: each token's projected rows times its routing weights, summed in slot order, in their common dtype.

    Args:
        h_SI: activated rows in slot order, in the dtype of the products.
        order_S, slot_TK, expert_S, offsets_E: the plan that `route` made.
        down_E, down_bias_E, weight_layout: as `expert_down` takes them.
        expert_weights_TK: routing weights.
    """
    out = _DownCombine.apply(  # type: ignore[no-untyped-call]
        h_SI, expert_weights_TK, down_bias_E, order_S, slot_TK, expert_S, offsets_E, weight_layout, *down_E
    )
    return out  # type: ignore[no-any-return]
