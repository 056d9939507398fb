"""``samoyeds::experts_sorted``: experts on rows that come sorted by expert, from other ranks for example."""

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
    check_choice,
    check_devices,
    check_experts,
    check_gate,
)


def experts_sorted(
    x_RH: Tensor,
    offsets_E: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """``out[r] = down_e(act(up_e(x[r])))`` for the rows r of every expert e; no row is moved.

    Args:
        x_RH: rows sorted by expert; R may be symbolic, of unknown value, or 0.
        offsets_E: int32, end of each expert's run of rows.
        gate_E, up_E, activation, gate_up_layout: as `expert_up` takes them.
        down_E: as `expert_down` takes it.
        weight_layout: one of `operands.WEIGHT_LAYOUTS`.
        compute_dtype: dtype of the products.
        out_dtype: dtype of the result; None is ``compute_dtype``.

    Returns:
        [R, H]; rows after the last run belong to no expert and are undefined.

    Raises:
        OperandError: an operand does not fit the others.
    """
    _check(x_RH, offsets_E, gate_E, up_E, down_E, activation, gate_up_layout, weight_layout)
    in_out, linear = weight_layout == "in_out", torch.ops.samoyeds.expert_linear
    x = x_RH.to(compute_dtype)
    z = linear(x, up_E, offsets_E, in_out)
    inputs = split_gate(z, gate_up_layout)
    if gate_E:
        inputs = {"gate": linear(x, gate_E, offsets_E, in_out), "up": z}
    h_RI = expr.evaluate(activation, inputs).to(compute_dtype)
    out_RH: Tensor = linear(h_RI, down_E, offsets_E, in_out)
    return out_RH if out_dtype is None else out_RH.to(out_dtype)


def _check(
    x: Tensor,
    offsets: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> None:
    op = "experts_sorted"
    if x.dim() != 2:
        raise bad_operand(op, "x", f"has rank {x.dim()}", "pass rows as [R, H]")
    if offsets.dtype != torch.int32:
        raise bad_operand(op, "offsets", f"has dtype {offsets.dtype}", "pass the ends of all runs as int32")
    check_experts(op, gate_E, up_E, down_E)
    check_devices(op, x=x, offsets=offsets, up=up_E[0], down=down_E[0])
    check_gate(op, gate_E, gate_up_layout)
    check_activation(op, activation, gate_up_layout)
    check_choice(op, "weight_layout", weight_layout, WEIGHT_LAYOUTS)


define_composite(
    "experts_sorted(Tensor x, Tensor offsets, Tensor[] gate, Tensor[] up, Tensor[] down, str activation, "
    "str gate_up_layout, str weight_layout, ScalarType compute_dtype, ScalarType? out_dtype) -> Tensor",
    experts_sorted,
)
