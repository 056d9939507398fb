"""``samoyeds::expert_down`` and its halves, ``expert_project`` and ``combine``: project back, weigh, sum per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_compile.ops import rows
from samoyeds_compile.ops.down_combine import down_combine
from samoyeds_compile.ops.expert_up import biased_linear
from samoyeds_compile.ops.library import define_composite


def expert_down(
    h_SI: Tensor,
    order_S: Tensor,
    slot_TK: Tensor,
    expert_S: Tensor,
    offsets_E: Tensor,
    down_E: Sequence[Tensor],
    down_bias_E: Tensor | None,
    expert_weights_TK: Tensor | None,
    weight_layout: str,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """`expert_project`, then `combine`.

    Args:
        h_SI: activated rows in slot order.
        order_S, slot_TK, expert_S, offsets_E: the plan that `route` made.
        down_E: [E, H, I] as a stack or as matrices (see `operands`), [E, I, H] if ``weight_layout`` is ``in_out``.
        down_bias_E: [E, H].
        expert_weights_TK: routing weights; None sums the rows as they are.
        weight_layout: ``out_in`` or ``in_out``.
        compute_dtype: dtype of the products.
        out_dtype: dtype of the result; None is what rows and routing weights promote to.

    Returns:
        [T, H].
    """
    if expert_weights_TK is None:
        y_SH = expert_project(h_SI, expert_S, offsets_E, down_E, down_bias_E, weight_layout, compute_dtype)
        return combine(y_SH, order_S, slot_TK, offsets_E, None, out_dtype)
    plan = (order_S, slot_TK, expert_S, offsets_E)
    out_TH = down_combine(h_SI.to(compute_dtype), *plan, down_E, down_bias_E, expert_weights_TK, weight_layout)
    return out_TH if out_dtype is None else out_TH.to(out_dtype)


def expert_project(
    h_SI: Tensor,
    expert_S: Tensor,
    offsets_E: Tensor,
    down_E: Sequence[Tensor],
    down_bias_E: Tensor | None,
    weight_layout: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    """Second projection of every expert: [S, H], rows in slot order, for what must run before the weighting."""
    return biased_linear(h_SI.to(compute_dtype), down_E, down_bias_E, expert_S, offsets_E, weight_layout)


def combine(
    y_SH: Tensor,
    order_S: Tensor,
    slot_TK: Tensor,
    offsets_E: Tensor,
    expert_weights_TK: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """Sum each token's k rows, weighted if weights are given, in slot order and so deterministically."""
    if expert_weights_TK is None:
        out_TH = rows.collect(y_SH, order_S, slot_TK, offsets_E)
    else:
        out_TH = rows.combine(y_SH, expert_weights_TK, order_S, slot_TK, offsets_E)
    return out_TH if out_dtype is None else out_TH.to(out_dtype)


define_composite(
    "expert_down(Tensor h, Tensor order, Tensor slot, Tensor expert, Tensor offsets, Tensor[] down, "
    "Tensor? down_bias, Tensor? expert_weights, str weight_layout, ScalarType compute_dtype, ScalarType? out_dtype) "
    "-> Tensor",
    expert_down,
)
define_composite(
    "expert_project(Tensor h, Tensor expert, Tensor offsets, Tensor[] down, Tensor? down_bias, str weight_layout, "
    "ScalarType compute_dtype) -> Tensor",
    expert_project,
)
define_composite(
    "combine(Tensor y, Tensor order, Tensor slot, Tensor offsets, Tensor? expert_weights, ScalarType? out_dtype) "
    "-> Tensor",
    combine,
)
