"""``samoyeds::experts_gpu``: the canonical op computed by `gpu_experts`, generated kernels for CUDA devices.

The lowering chooses it (see `samoyeds_compile.lower.gpu`), for dense and for packed weights alike, and says which kinds
of kernels may be taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.expr import ExpressionError
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern
from samoyeds_compile.ops.library import define_composite
from samoyeds_compile.ops.moe_experts import OPERANDS, check_canonical
from samoyeds_compile.ops.one_kernel import needs_gradients
from samoyeds_compile.ops.operands import in_width, is_stack, out_width
from samoyeds_compile.sparsity.tensor import PackedTensor


def experts_gpu(
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
    kinds: str = "triton",
    gathers: int = 0,
) -> Tensor:
    """The same function of the same operands as `moe_experts`, and `moe_experts` itself where no kernel fits them.

    ``kinds`` and ``gathers`` are as `gpu_experts` takes them; kernels of these kinds have proven themselves on the
    device.

    Raises:
        OperandError: an operand does not fit the others.
    """
    check_canonical(
        "experts_gpu", x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, activation, gate_up_layout,
        weight_layout, weighting,
    )  # fmt: skip
    biases = (gate_bias_E, up_bias_E, down_bias_E)
    weights = (gate_E, up_E, down_E)
    spec = gpu_spec(*weights, activation, gate_up_layout, weight_layout, weighting, compute_dtype)
    # Kernels give packed weights no gradient of their own; they are frozen, wherever this package packs them.
    if isinstance(spec, str) or (spec.pattern is not None and needs_gradients([*gate_E, *up_E, *down_E])):
        return torch.ops.samoyeds.moe_experts(  # type: ignore[no-any-return]
            x_TH, expert_ids_TK, expert_weights_TK, *weights, *biases, activation, gate_up_layout, weight_layout,
            weighting, compute_dtype, out_dtype,
        )  # fmt: skip
    width = in_width(down_E, weight_layout == "in_out")
    return torch.ops.samoyeds.gpu_experts(  # type: ignore[no-any-return]
        x_TH.to(compute_dtype), expert_ids_TK, expert_weights_TK, *map(_stored, weights), *biases, spec.name, width,
        gate_up_layout, weight_layout, out_dtype or torch.promote_types(compute_dtype, expert_weights_TK.dtype), kinds,
        gathers,
    )  # fmt: skip


def gpu_spec(
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
    compute_dtype: torch.dtype,
) -> ExpertsSpec | str:
    """The kernels that compute experts with these operands, or why there are none."""
    weights = [*gate_E, *up_E, *down_E]
    separate = not all(is_stack(ws) for ws in (gate_E, up_E, down_E) if ws)
    if any(w.stride() != ws[0].stride() for ws in (gate_E, up_E, down_E) for w in ws):
        return "the matrices of the experts differ in strides"
    if any(w.dtype != compute_dtype for w in weights):
        return f"weights are not {compute_dtype}, in which the block computes"
    if weighting != "output":
        return "routing weights multiply what goes into the experts"
    pattern = _pattern(gate_E, up_E, down_E, gate_up_layout, weight_layout == "in_out")
    if isinstance(pattern, str):
        return pattern
    try:
        return ExpertsSpec(
            str(compute_dtype).removeprefix("torch."), pattern, activation, gate_up_layout != "none", separate
        )
    except (UnsupportedSpecError, ExpressionError) as error:
        return str(error)


def weight_form(
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_up_layout: str,
    weight_layout: str,
    bias: bool,
) -> Form:
    """What else about the operands makes Triton compile another kernel, for `prove`."""
    in_out, dense = weight_layout == "in_out", not isinstance(up_E[0], PackedTensor)
    sizes = [*up_E[0].shape[-2:], in_width(down_E, in_out), out_width(down_E, in_out)]
    return Form(
        aligned=all(size % 16 == 0 for size in sizes),
        transposed=dense and up_E[0].stride(-2 if in_out else -1) != 1,
        interleaved=dense and gate_up_layout == "interleaved",
        bias=bias,
    )


def _pattern(
    gate_E: Sequence[Tensor], up_E: Sequence[Tensor], down_E: Sequence[Tensor], gate_up_layout: str, in_out: bool
) -> Pattern | str | None:
    """The pattern of packed weights, None if all are dense, or why no kernel reads them."""
    weights = [*gate_E, *up_E, *down_E]
    packed = [w for w in weights if isinstance(w, PackedTensor)]
    if not packed:
        return None
    config = packed[0].form.config
    if len(packed) < len(weights) or any(w.form.config != config for w in packed):
        return "the projections have different patterns, or not all are packed"
    if config.inner != "2:4":
        return f"there is no kernel for the pattern {config}"
    if any(w.form.flipped != in_out for w in packed):
        return "the sum runs over the rows of the packed matrices"
    alternates = [*[False] * len(gate_E), *[gate_up_layout == "interleaved"] * len(up_E), *[False] * len(down_E)]
    if [w.form.interleaved for w in packed] != alternates:
        return "gate and up rows alternate in packed storage, or do not where they should"
    if gate_up_layout in ("concatenated", "interleaved") and packed[0].form.rows // 2 % config.m:
        return f"the first up row lies within a block of {config.m} rows"
    try:
        return Pattern(config.n, config.m, config.vector, config.group)
    except UnsupportedSpecError as error:
        return str(error)


def _stored(weights: Sequence[Tensor]) -> list[Tensor]:
    """Dense weights, or values, metadata and, if it is stored, selection of packed ones: all values come first."""
    packed = [w.packed for w in weights if isinstance(w, PackedTensor)]
    if not packed:
        return list(weights)
    parts = ([p.values for p in packed], [p.metadata for p in packed], [p.selection for p in packed])
    return [tensor for part in parts for tensor in part if tensor is not None]


define_composite(f'experts_gpu({OPERANDS}, str kinds="triton", int gathers=0) -> Tensor', experts_gpu)
