"""``samoyeds::experts_packed``: the canonical op on packed weights, computed by `sparse_experts`.

The lowering chooses it (see `samoyeds_compile.lower.kernels`). Here packed weights are still tensors of their own kind;
below, the kernel sees what they consist of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen.cpp.spec import ExpertsSpec, strip_rows
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.expr import ExpressionError
from samoyeds_compile.ops.library import define_composite
from samoyeds_compile.ops.moe_experts import OPERANDS, check_canonical
from samoyeds_compile.ops.one_kernel import needs_gradients, refusal, with_layouts
from samoyeds_compile.sparsity.tensor import PackedTensor


def experts_packed(
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
        "experts_packed", x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, activation, gate_up_layout,
        weight_layout, weighting,
    )  # fmt: skip
    spec = kernel_spec(
        gate_E, up_E, down_E, activation, gate_up_layout, weight_layout, weighting, compute_dtype
    )  # fmt: skip
    biases = (gate_bias_E, up_bias_E, down_bias_E)
    if isinstance(spec, str) or needs_gradients((x_TH, expert_weights_TK, *biases)):
        return torch.ops.samoyeds.moe_experts(  # type: ignore[no-any-return]
            x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, *biases, activation, gate_up_layout,
            weight_layout, weighting, compute_dtype, out_dtype,
        )  # fmt: skip
    width = _rows(up_E) // (2 if gate_up_layout in ("concatenated", "interleaved") else 1)
    rows_of_biases = (width, _rows(up_E), _rows(down_E))
    return torch.ops.samoyeds.sparse_experts(  # type: ignore[no-any-return]
        x_TH.to(compute_dtype), expert_ids_TK, expert_weights_TK,
        *(_storage(weights, spec.strips) for weights in (gate_E, up_E, down_E)),
        *(_bias(bias, rows, compute_dtype) for bias, rows in zip(biases, rows_of_biases, strict=True)),
        with_layouts(spec, layouts).name, width, gate_up_layout,
        out_dtype or torch.promote_types(compute_dtype, expert_weights_TK.dtype),
    )  # fmt: skip


def kernel_spec(
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
    compute_dtype: torch.dtype,
) -> ExpertsSpec | str:
    """The kernel that computes experts with these operands, or why there is none."""
    weights = [*gate_E, *up_E, *down_E]
    packed = [w for w in weights if isinstance(w, PackedTensor)]
    if len(packed) < len(weights):
        return "not all weights are packed"
    config = packed[0].form.config
    if any(w.form.config != config for w in packed):
        return "the projections have different patterns"
    if config.inner != "2:4":
        return f"there is no kernel for the pattern {config}"
    if (reason := refusal(packed, weighting, compute_dtype)) is not None:
        return reason
    if any(w.form.flipped != (weight_layout == "in_out") for w in packed):
        return "the sum runs over the rows of the packed matrices"
    if [_is_interleaved(ws) for ws in (gate_E, up_E, down_E)] != [False, gate_up_layout == "interleaved", False]:
        return "gate and up rows alternate in packed storage, or do not where they should"
    if gate_up_layout in ("concatenated", "interleaved") and _rows(up_E) // 2 % config.m:
        return f"the first up row lies within a block of {config.m} rows"
    dtype = str(compute_dtype).removeprefix("torch.")
    try:
        return ExpertsSpec(
            dtype, config.n, config.m, config.vector, config.group, activation, gate_up_layout != "none",
            _in_strips(up_E, packed, gate_up_layout),
        )  # fmt: skip
    except (UnsupportedSpecError, ExpressionError) as error:
        return str(error)


def _in_strips(up_E: Sequence[Tensor], packed: Sequence[PackedTensor], layout: str) -> bool:
    """Whether all matrices lie in strips, and no strip has gate rows and up rows; else they are read as canonical."""
    config = packed[0].form.config
    halves = 2 if layout in ("concatenated", "interleaved") else 1
    whole = _rows(up_E) // halves % strip_rows(config.n, config.m) == 0
    return whole and all(w.form.strips for w in packed)


def _is_interleaved(weights: Sequence[Tensor]) -> bool:
    return any(isinstance(w, PackedTensor) and w.form.interleaved for w in weights)


def _rows(weights: Sequence[Tensor]) -> int:
    """Output features of packed matrices."""
    assert isinstance(weights[0], PackedTensor)
    return weights[0].form.rows


def _storage(weights: Sequence[Tensor], strips: bool) -> list[Tensor]:
    """Storage as `sparse_experts` takes it: all values, then all metadata, then all selections."""
    packed = [w.in_order(strips) for w in weights if isinstance(w, PackedTensor)]
    parts: list[list[Tensor | None]] = [
        [w.kept for w in packed],
        [w.metadata for w in packed],
        [w.selection for w in packed],
    ]
    return [t for part in parts for t in part if t is not None]


def _bias(bias_E: Tensor | None, rows: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias_E is None else bias_E.to(dtype).expand(-1, rows)


define_composite(f"experts_packed({OPERANDS}, str layouts='') -> Tensor", experts_packed)
