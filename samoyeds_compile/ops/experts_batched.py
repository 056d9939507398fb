"""``samoyeds::experts_batched``: experts on rows that a block with capacities has already dispatched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.ops.expert_up import split_gate
from samoyeds_compile.ops.library import bad_operand, define_composite
from samoyeds_compile.ops.operands import (
    WEIGHT_LAYOUTS,
    check_activation,
    check_bias,
    check_choice,
    check_devices,
    check_experts,
    check_gate,
    in_width,
    is_stack,
    num_experts,
)


def experts_batched(
    x_ECH: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """``out[e, c] = down_e(act(up_e(x[e, c])))``; a stack is one batched product, separate matrices one each.

    Args:
        x_ECH: rows of every expert, C of them; C may be symbolic or 0.
        gate_E, up_E, gate_bias_E, up_bias_E, activation, gate_up_layout: as `expert_up` takes them.
        down_E, down_bias_E: as `expert_down` takes them.
        weight_layout: one of `operands.WEIGHT_LAYOUTS`.
        compute_dtype: dtype of the products.
        out_dtype: dtype of the result; None is ``compute_dtype``.

    Returns:
        [E, C, H].

    Raises:
        OperandError: an operand does not fit the others.
    """
    _check(x_ECH, gate_E, up_E, down_E, activation, gate_up_layout, weight_layout)
    in_out = weight_layout == "in_out"
    x = x_ECH.to(compute_dtype)
    z = _linear("up", x, up_E, up_bias_E, in_out)
    inputs = split_gate(z, gate_up_layout)
    if gate_E:
        inputs = {"gate": _linear("gate", x, gate_E, gate_bias_E, in_out), "up": z}
    h_ECI = expr.evaluate(activation, inputs).to(compute_dtype)
    out_ECH = _linear("down", h_ECI, down_E, down_bias_E, in_out)
    return out_ECH if out_dtype is None else out_ECH.to(out_dtype)


def _linear(name: str, x_ECI: Tensor, weights: Sequence[Tensor], bias_E: Tensor | None, in_out: bool) -> Tensor:
    """One projection of all experts, [E, C, O] in the dtype of x."""
    if x_ECI.shape[2] != in_width(weights, in_out):
        reason = f"takes rows of width {in_width(weights, in_out)} and gets {x_ECI.shape[2]}"
        raise bad_operand("experts_batched", name, reason, "pass [E, out, in], or [E, in, out] with layout 'in_out'")
    if bias_E is not None:
        check_bias("experts_batched", bias_E, weights, in_out)
    if not is_stack(weights):
        y_ECO = _linear_by_expert(x_ECI, weights, in_out)
        return y_ECO if bias_E is None else (y_ECO + bias_E.unsqueeze(1)).to(y_ECO.dtype)
    weight_E = weights[0].to(x_ECI.dtype)
    matrix_EIO = weight_E if in_out else weight_E.transpose(1, 2)
    with torch._C._DisableAutocast():  # the dtype of the products is an operand, as it is for `expert_linear`
        if bias_E is not None and bias_E.dtype == x_ECI.dtype:
            return torch.baddbmm(bias_E.unsqueeze(1), x_ECI, matrix_EIO)
        y_ECO = torch.bmm(x_ECI, matrix_EIO)
    return y_ECO if bias_E is None else (y_ECO + bias_E.unsqueeze(1)).to(y_ECO.dtype)


def _linear_by_expert(x_ECI: Tensor, weights: Sequence[Tensor], in_out: bool) -> Tensor:
    experts, capacity, width = x_ECI.shape
    offsets_E = torch.arange(1, experts + 1, device=x_ECI.device, dtype=torch.int32) * capacity
    y_SO: Tensor = torch.ops.samoyeds.expert_linear(
        x_ECI.reshape(experts * capacity, width), weights, offsets_E, in_out
    )
    return y_SO.view(experts, capacity, y_SO.shape[1])


def _check(
    x: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> None:
    op = "experts_batched"
    check_experts(op, gate_E, up_E, down_E)
    if x.dim() != 3 or x.shape[0] != num_experts(up_E):
        remedy = f"pass [E, C, H] with E = {num_experts(up_E)}"
        raise bad_operand(op, "x", f"has shape {tuple(x.shape)}", remedy)
    check_devices(op, x=x, up=up_E[0], down=down_E[0])
    check_gate(op, gate_E, gate_up_layout)
    check_activation(op, activation, gate_up_layout)
    check_choice(op, "weight_layout", weight_layout, WEIGHT_LAYOUTS)


define_composite(
    "experts_batched(Tensor x, Tensor[] gate, Tensor[] up, Tensor[] down, Tensor? gate_bias, Tensor? up_bias, "
    "Tensor? down_bias, str activation, str gate_up_layout, str weight_layout, ScalarType compute_dtype, "
    "ScalarType? out_dtype) -> Tensor",
    experts_batched,
)
