"""``samoyeds::dense_experts``: the whole block in one kernel that reads dense weights, for inference on a CPU.

The op on a CPU is C++ once that is loaded, as `sparse_experts` is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen.cpp.kernel import experts_kernel
from samoyeds_codegen.cpp.spec import DenseExpertsSpec
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.ops.experts_dense import lies
from samoyeds_compile.ops.library import bad_operand
from samoyeds_compile.ops.moe_experts import moe_experts
from samoyeds_compile.ops.one_kernel import check_tokens, define_kernel_op
from samoyeds_compile.ops.operands import in_width, is_stack, num_experts

logger = logging.getLogger(__name__)


def dense_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    kernel: str,
    gate_up_layout: str,
    weight_layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """``moe_experts`` on dense weights of one dtype, whose routing weights multiply what the experts give.

    Where no kernel can be had (no compiler, say), or for more tokens than it is for, the products are PyTorch's.

    Args:
        x_TH: tokens in the dtype of the weights.
        expert_ids_TK: integers; what is no expert contributes nothing.
        expert_weights_TK: routing weights.
        gate_E, up_E, down_E: stacks, or a matrix an expert, in the dtype of the rows; in another order of memory than
            the kernel reads they are computed without it.
        gate_bias_E, up_bias_E, down_bias_E: [E, out] or [E, 1], in the dtype of the weights.
        kernel: dtype and activation, as `DenseExpertsSpec.name` writes them.
        gate_up_layout, weight_layout: as `expert_up` takes them.
        out_dtype: of the result.

    Returns:
        [T, H].

    Raises:
        OperandError: an operand does not fit the others.
    """
    biases = (gate_bias_E, up_bias_E, down_bias_E)
    in_out = weight_layout == "in_out"
    _check(x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, biases, gate_up_layout, in_out)
    spec, projections = DenseExpertsSpec.named(kernel), [ws for ws in (gate_E, up_E, down_E) if ws]
    try:
        experts_kernel(spec)
        few = spec.layouts.fits(expert_ids_TK.numel(), num_experts(up_E))
        fits = few and lies(projections, in_out, spec.by_columns)
    except KernelError as error:
        logger.warning("samoyeds::dense_experts runs without a kernel: %s", error)
        fits = False
    if not fits:
        return moe_experts(x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, *biases, spec.activation,
                           gate_up_layout, weight_layout, "output", x_TH.dtype, out_dtype)  # fmt: skip
    return torch.ops.samoyeds.dense_experts(  # type: ignore[no-any-return]
        x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, *biases, kernel, gate_up_layout, weight_layout,
        out_dtype,
    )  # fmt: skip


def _check(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_up_layout: str,
    in_out: bool,
) -> None:
    """Everything that a kernel takes for granted, as it would read beyond its operands."""
    op, hidden = "dense_experts", x_TH.shape[-1]
    check_tokens(op, x_TH, expert_ids_TK, expert_weights_TK)
    experts, width = num_experts(up_E), in_width(down_E, in_out)
    rows = 2 * width if gate_up_layout in ("concatenated", "interleaved") else width
    expected = {"gate": (gate_E, width, hidden), "up": (up_E, rows, hidden), "down": (down_E, hidden, width)}
    for (name, (weights, out, into)), bias in zip(expected.items(), biases, strict=True):
        if name == "gate" and gate_up_layout != "separate":
            continue
        shape = (into, out) if in_out else (out, into)
        wanted = (experts, *shape) if is_stack(weights) else shape
        if len(weights) not in (1, experts) or any(w.shape != wanted or w.dtype != x_TH.dtype for w in weights):
            is_ = f"holds {len(weights)} of {weights[0].dtype} {list(weights[0].shape)}"
            raise bad_operand(op, name, is_, f"pass {x_TH.dtype} {list(wanted)}, for {experts} experts")
        if bias is not None and (bias.shape not in ((experts, out), (experts, 1)) or bias.dtype != x_TH.dtype):
            raise bad_operand(op, f"{name}_bias", f"is {bias.dtype} {list(bias.shape)}", f"pass [{experts}, {out}]")


define_kernel_op(
    "dense_experts", "str kernel, str gate_up_layout, str weight_layout, ScalarType out_dtype", dense_experts
)
