"""``samoyeds::expert_up``: gather each expert's tokens, project them up, activate."""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.ops.library import bad_operand, define_composite
from samoyeds_compile.ops.rows import dispatch, expert_rows

GATE_UP_LAYOUTS = ("concatenated", "interleaved", "separate", "none")
"""Where gate and up lie in the first projection: halves, even and odd features, two weights, or no gate at all."""
WEIGHT_LAYOUTS = ("out_in", "in_out")


def expert_up(
    x_TH: Tensor,
    order_S: Tensor,
    slot_TK: Tensor,
    expert_S: Tensor,
    offsets_E: Tensor,
    gate_E: Tensor | None,
    up_E: Tensor,
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    compute_dtype: torch.dtype,
) -> Tensor:
    """First projection of every expert over its tokens, with the activation.

    Args:
        x_TH: tokens.
        order_S, slot_TK, expert_S, offsets_E: the plan that `route` made.
        gate_E: [E, I, H], only with layout ``separate``.
        up_E: [E, 2I, H] with gate and up packed, [E, I, H] otherwise ([E, H, ...] if ``weight_layout`` is ``in_out``).
        gate_bias_E, up_bias_E: [E, I] and [E, 2I] or [E, I].
        activation: expression of `samoyeds_codegen.expr`; ``"x"`` leaves the packed rows as they are.
        gate_up_layout: one of `GATE_UP_LAYOUTS`.
        weight_layout: one of `WEIGHT_LAYOUTS`.
        compute_dtype: dtype of the products.

    Returns:
        [S, I] (or [S, 2I] for activation ``"x"`` over packed weights), rows in slot order.
    """
    if gate_up_layout not in GATE_UP_LAYOUTS:
        raise bad_operand("expert_up", "gate_up_layout", f"is {gate_up_layout!r}", f"use one of {GATE_UP_LAYOUTS}")
    if (gate_E is not None) != (gate_up_layout == "separate"):
        raise bad_operand(
            "expert_up", "gate", "does not fit the layout", "pass it with layout 'separate' and only then"
        )
    x_SH = dispatch(x_TH.to(compute_dtype), order_S, slot_TK, offsets_E)
    z = biased_linear(x_SH, up_E, up_bias_E, expert_S, offsets_E, weight_layout)
    if gate_E is not None:
        gate = biased_linear(x_SH, gate_E, gate_bias_E, expert_S, offsets_E, weight_layout)
        return expr.evaluate(activation, {"gate": gate, "up": z})  # type: ignore[no-any-return]
    return expr.evaluate(activation, split_gate(z, gate_up_layout))  # type: ignore[no-any-return]


def biased_linear(
    x_S: Tensor, weight_E: Tensor, bias_E: Tensor | None, expert_S: Tensor, offsets_E: Tensor, weight_layout: str
) -> Tensor:
    """One projection of all experts, with its bias."""
    if weight_layout not in WEIGHT_LAYOUTS:
        raise bad_operand("expert_linear", "weight_layout", f"is {weight_layout!r}", f"use one of {WEIGHT_LAYOUTS}")
    in_out = weight_layout == "in_out"
    if bias_E is not None:
        _check_bias(bias_E, weight_E, in_out)
    y_S: Tensor = torch.ops.samoyeds.expert_linear(x_S, weight_E, offsets_E, in_out)
    return y_S if bias_E is None else (y_S + expert_rows(bias_E, expert_S, offsets_E)).to(y_S.dtype)


def _check_bias(bias_E: Tensor, weight_E: Tensor, in_out: bool) -> None:
    experts, width = weight_E.shape[0], weight_E.shape[2 if in_out else 1]
    if bias_E.dim() != 2 or bias_E.shape[0] != experts or bias_E.shape[1] not in (1, width):
        remedy = f"pass [{experts}, {width}], one row an expert"
        raise bad_operand("expert_linear", "bias", f"has shape {tuple(bias_E.shape)}", remedy)
    if bias_E.device != weight_E.device:
        reason = f"lies on {bias_E.device} and the weight on {weight_E.device}"
        raise bad_operand("expert_linear", "bias", reason, "move them to one device")


def split_gate(z_S: Tensor, gate_up_layout: str) -> dict[str, Tensor]:
    """The inputs of the activation out of the packed rows."""
    if gate_up_layout == "concatenated":
        gate, up = z_S.chunk(2, dim=-1)
        return {"gate": gate, "up": up}
    if gate_up_layout == "interleaved":
        return {"gate": z_S[..., ::2], "up": z_S[..., 1::2]}
    return {expr.PLAIN_NAME: z_S}


define_composite(
    "expert_up(Tensor x, Tensor order, Tensor slot, Tensor expert, Tensor offsets, Tensor? gate, Tensor up, "
    "Tensor? gate_bias, Tensor? up_bias, str activation, str gate_up_layout, str weight_layout, "
    "ScalarType compute_dtype) -> Tensor",
    expert_up,
)
