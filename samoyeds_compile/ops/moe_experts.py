"""``samoyeds::moe_experts``: the canonical op. Every surface pattern becomes this; every lowering starts from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_compile.ops.library import bad_operand, define_composite
from samoyeds_compile.ops.operands import (
    WEIGHT_LAYOUTS,
    WEIGHTINGS,
    check_activation,
    check_choice,
    check_devices,
    check_experts,
    check_gate,
    num_experts,
)


def moe_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """``out[t] = sum over k of w[t, k] * F_e(x[t])``, ``F_e(x) = down_e(act(up_e(x)))`` and ``e = expert_ids[t, k]``.

    With weighting ``input`` it is ``out[t] = sum over k of F_e(w[t, k] * x[t])``.

    An id outside ``0..E-1`` contributes nothing. No tokens, experts without tokens, one expert for all tokens, K = 1
    and an expert named twice by a token are all legal. Differentiable in x, the routing weights, weights and biases.

    Args:
        x_TH: tokens.
        expert_ids_TK: integers.
        expert_weights_TK: routing weights, floating.
        gate_E, up_E, gate_bias_E, up_bias_E, activation, gate_up_layout: as `expert_up` takes them.
        down_E, down_bias_E: as `expert_down` takes them.
        weight_layout: ``out_in`` ([E, out, in]) or ``in_out`` ([E, in, out]), of all weights.
        weighting: one of `operands.WEIGHTINGS`.
        compute_dtype: dtype of the products.
        out_dtype: dtype of the result; None is what the rows and the routing weights promote to, and with weighting
            ``input`` the dtype of the rows.

    Raises:
        OperandError: an operand does not fit the others.
    """
    check_canonical(
        "moe_experts", x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, activation, gate_up_layout,
        weight_layout, weighting,
    )  # fmt: skip
    ops = torch.ops.samoyeds
    plan = ops.route(expert_ids_TK, num_experts(up_E))
    before, after = (expert_weights_TK, None) if weighting == "input" else (None, expert_weights_TK)
    h_SI = ops.expert_up(x_TH, *plan, gate_E, up_E, gate_bias_E, up_bias_E, before, activation, gate_up_layout,
                         weight_layout, compute_dtype)  # fmt: skip
    return ops.expert_down(  # type: ignore[no-any-return]
        h_SI, *plan, down_E, down_bias_E, after, weight_layout, compute_dtype, out_dtype
    )


def check_canonical(
    op: str,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
) -> None:
    """Raise `OperandError` for operands that do not fit, as far as the products do not do so themselves."""
    if x.dim() != 2:
        raise bad_operand(op, "x", f"has rank {x.dim()}", "pass tokens as [T, H]")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        shape = tuple(ids.shape)
        raise bad_operand(op, "expert_ids", f"has shape {shape}", f"pass [T, K] with T = {x.shape[0]}")
    if weights.shape != ids.shape:
        shape = tuple(weights.shape)
        raise bad_operand(op, "expert_weights", f"has shape {shape}", "give it the shape of expert_ids")
    check_experts(op, gate_E, up_E, down_E)
    check_devices(op, x=x, expert_ids=ids, expert_weights=weights, up=up_E[0])
    check_gate(op, gate_E, gate_up_layout)
    check_activation(op, activation, gate_up_layout)
    check_choice(op, "weight_layout", weight_layout, WEIGHT_LAYOUTS)
    check_choice(op, "weighting", weighting, WEIGHTINGS)


OPERANDS = (
    "Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str activation, str gate_up_layout, str weight_layout, "
    "str weighting, ScalarType compute_dtype, ScalarType? out_dtype"
)
define_composite(f"moe_experts({OPERANDS}) -> Tensor", moe_experts)
