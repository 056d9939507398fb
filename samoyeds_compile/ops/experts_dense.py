"""``samoyeds::experts_dense``: the canonical op computed by `dense_experts`, one kernel for the whole block.

The lowering chooses it (see `samoyeds_compile.lower.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen.cpp.spec import DenseExpertsSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.expr import ExpressionError
from samoyeds_compile.ops.library import define_composite
from samoyeds_compile.ops.moe_experts import OPERANDS, check_canonical
from samoyeds_compile.ops.one_kernel import needs_gradients, refusal, with_layouts
from samoyeds_compile.ops.operands import is_stack
from samoyeds_compile.sparsity.tensor import PackedTensor


def experts_dense(
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
    layouts: str = "",
) -> Tensor:
    """The same function of the same operands as `moe_experts`, and `moe_experts` itself where no kernel fits them.

    ``layouts`` are those of the edges inside the kernel, by name (`samoyeds_codegen.cpp.layouts`); empty: as they come.

    Raises:
        OperandError: an operand does not fit the others.
    """
    check_canonical(
        "experts_dense", x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, activation, gate_up_layout,
        weight_layout, weighting,
    )  # fmt: skip
    operands = [x_TH, expert_weights_TK, *gate_E, *up_E, *down_E, gate_bias_E, up_bias_E, down_bias_E]
    spec = dense_spec(gate_E, up_E, down_E, activation, gate_up_layout, weight_layout, weighting, compute_dtype)
    if isinstance(spec, str) or needs_gradients(operands):
        return torch.ops.samoyeds.moe_experts(  # type: ignore[no-any-return]
            x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, gate_bias_E, up_bias_E, down_bias_E,
            activation, gate_up_layout, weight_layout, weighting, compute_dtype, out_dtype,
        )  # fmt: skip
    return torch.ops.samoyeds.dense_experts(  # type: ignore[no-any-return]
        x_TH.to(compute_dtype), expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E,
        *(None if b is None else b.to(compute_dtype) for b in (gate_bias_E, up_bias_E, down_bias_E)),
        with_layouts(spec, layouts).name, gate_up_layout, weight_layout,
        out_dtype or torch.promote_types(compute_dtype, expert_weights_TK.dtype),
    )  # fmt: skip


def dense_spec(
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
    compute_dtype: torch.dtype,
) -> DenseExpertsSpec | str:
    """The kernel that computes experts with these operands, or why there is none."""
    weights = [*gate_E, *up_E, *down_E]
    if any(isinstance(w, PackedTensor) for w in weights):
        return "some weights are packed"
    if (reason := refusal(weights, weighting, compute_dtype)) is not None:
        return reason
    projections, in_out = [ws for ws in (gate_E, up_E, down_E) if ws], weight_layout == "in_out"
    by_columns = not lies(projections, in_out, by_columns=False)
    if by_columns and not lies(projections, in_out, by_columns=True):
        return "neither the weights of one output nor those of one input are contiguous"
    try:
        dtype = str(compute_dtype).removeprefix("torch.")
        return DenseExpertsSpec(dtype, activation, gate_up_layout != "none", by_columns)
    except (UnsupportedSpecError, ExpressionError) as error:
        return str(error)


def lies(projections: Sequence[Sequence[Tensor]], in_out: bool, by_columns: bool) -> bool:
    """Whether the weights of one input (``by_columns``), or else of one output, are contiguous, everywhere."""
    inner, outer = (-1, -2) if in_out == by_columns else (-2, -1)
    return all(
        (is_stack(weights) or all(w.stride() == weights[0].stride() for w in weights))
        and weights[0].stride(inner) == 1
        and weights[0].stride(outer) >= weights[0].shape[inner]
        for weights in projections
    )


define_composite(f"experts_dense({OPERANDS}, str layouts='') -> Tensor", experts_dense)
