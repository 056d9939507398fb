"""``samoyeds::expert_up``: gather each expert's tokens, project them up, activate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.ops.library import define_composite
from samoyeds_compile.ops.one_kernel import needs_gradients
from samoyeds_compile.ops.operands import WEIGHT_LAYOUTS, check_bias, check_choice, check_gate
from samoyeds_compile.ops.rows import dispatch, dispatch_weighted, expert_rows


def expert_up(
    x_TH: Tensor,
    order_S: Tensor,
    slot_TK: Tensor,
    expert_S: Tensor,
    offsets_E: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    expert_weights_TK: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    """First projection of every expert over its tokens, with the activation.

    Matrices of gate and up that are not one read the same rows. Off the CPU and without gradients these are gathered
    once; on a CPU each product gathers those of an expert while they are in the cache, and for gradients tokens are
    kept instead of rows.

    Args:
        x_TH: tokens.
        order_S, slot_TK, expert_S, offsets_E: the plan that `route` made.
        gate_E: [E, I, H] as a stack or as matrices (see `operands`), only with layout ``separate``; empty otherwise.
        up_E: [E, 2I, H] with gate and up packed, [E, I, H] otherwise ([E, H, ...] if ``weight_layout`` is ``in_out``).
        gate_bias_E, up_bias_E: [E, I] and [E, 2I] or [E, I].
        expert_weights_TK: routing weights, for experts that weigh the rows that go in: each row is multiplied in the
            dtype that it and its weight promote to, then cast; None leaves the rows as they are.
        activation: expression of `samoyeds_codegen.expr`; ``"x"`` leaves the packed rows as they are.
        gate_up_layout: one of `operands.GATE_UP_LAYOUTS`.
        weight_layout: one of `operands.WEIGHT_LAYOUTS`.
        compute_dtype: dtype of the products.

    Returns:
        [S, I] (or [S, 2I] for activation ``"x"`` over packed weights), rows in slot order.
    """
    check_gate("expert_up", gate_E, gate_up_layout)
    check_choice("expert_up", "weight_layout", weight_layout, WEIGHT_LAYOUTS)
    in_out, linear = weight_layout == "in_out", torch.ops.samoyeds.expert_linear
    if expert_weights_TK is not None:
        rows: tuple[Tensor, ...] = (
            dispatch_weighted(x_TH, expert_weights_TK, order_S, slot_TK, offsets_E).to(compute_dtype),
        )
    elif gate_E and shares(x_TH.device) and not needs_gradients([x_TH, *gate_E, *up_E]):
        rows = (dispatch(x_TH.to(compute_dtype), order_S, slot_TK, offsets_E),)  # once for gate and up
    else:
        rows = (x_TH.to(compute_dtype), order_S, slot_TK)
        linear = torch.ops.samoyeds.token_linear

    def project(weight_E: Sequence[Tensor], bias_E: Tensor | None) -> Tensor:
        y_S = linear(*rows, weight_E, offsets_E, in_out)
        return add_bias(y_S, weight_E, bias_E, expert_S, offsets_E, in_out)

    z = project(up_E, up_bias_E)
    if gate_E:
        gate = project(gate_E, gate_bias_E)
        return expr.evaluate(activation, {"gate": gate, "up": z})  # type: ignore[no-any-return]
    return expr.evaluate(activation, split_gate(z, gate_up_layout))  # type: ignore[no-any-return]


def shares(device: torch.device) -> bool:
    """Whether products of the same tokens gather them once, all at a time."""
    return device.type != "cpu"


def biased_linear(
    x_S: Tensor,
    weight_E: Sequence[Tensor],
    bias_E: Tensor | None,
    expert_S: Tensor,
    offsets_E: Tensor,
    weight_layout: str,
) -> Tensor:
    """One projection of all experts, with its bias."""
    check_choice("expert_linear", "weight_layout", weight_layout, WEIGHT_LAYOUTS)
    in_out = weight_layout == "in_out"
    y_S = torch.ops.samoyeds.expert_linear(x_S, weight_E, offsets_E, in_out)
    return add_bias(y_S, weight_E, bias_E, expert_S, offsets_E, in_out)


def add_bias(
    y_S: Tensor, weight_E: Sequence[Tensor], bias_E: Tensor | None, expert_S: Tensor, offsets_E: Tensor, in_out: bool
) -> Tensor:
    """The rows plus the bias of their experts, in the dtype of the rows."""
    if bias_E is None:
        return y_S
    check_bias("expert_linear", bias_E, weight_E, in_out)
    return (y_S + expert_rows(bias_E, expert_S, offsets_E)).to(y_S.dtype)


def split_gate(z_S: Tensor, gate_up_layout: str) -> dict[str, Tensor]:
    """The inputs of the activation out of the packed rows, [..., 2I] or [..., I]."""
    if gate_up_layout == "concatenated":
        gate, up = z_S.chunk(2, dim=-1)
        return {"gate": gate, "up": up}
    if gate_up_layout == "interleaved":
        return {"gate": z_S[..., ::2], "up": z_S[..., 1::2]}
    return {expr.PLAIN_NAME: z_S}


define_composite(
    "expert_up(Tensor x, Tensor order, Tensor slot, Tensor expert, Tensor offsets, Tensor[] gate, Tensor[] up, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? expert_weights, str activation, str gate_up_layout, "
    "str weight_layout, ScalarType compute_dtype) -> Tensor",
    expert_up,
)
