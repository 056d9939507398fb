"""``samoyeds::dense_experts``: the whole block in one kernel that reads dense weights, for inference on a CPU."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen.cpp.dense import DenseExpertsKernel, DenseMatrix, dense_experts_kernel
from samoyeds_codegen.cpp.spec import DenseExpertsSpec
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.ops.expert_down import expert_down
from samoyeds_compile.ops.expert_up import expert_up
from samoyeds_compile.ops.experts_dense import lies_in_rows
from samoyeds_compile.ops.library import bad_operand, define_opaque
from samoyeds_compile.ops.operands import in_width, is_stack, num_experts, out_width
from samoyeds_compile.ops.route import route
from samoyeds_compile.ops.sparse_experts import OUTPUTS

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
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """``moe_experts`` on dense weights of one dtype, whose routing weights multiply what the experts give.

    Where no kernel can be had (no compiler, say), the products are those of PyTorch.

    Args:
        x_TH: tokens in the dtype of the weights.
        expert_ids_TK: integers; what is no expert contributes nothing.
        expert_weights_TK: routing weights.
        gate_E, up_E, down_E: stacks, or a matrix an expert, in the dtype of the rows.
        gate_bias_E, up_bias_E, down_bias_E: [E, out] or [E, 1], in the dtype of the weights.
        activation, gate_up_layout, weight_layout: as `expert_up` takes them.
        out_dtype: of the result.

    Returns:
        [T, H].

    Raises:
        OperandError: an operand does not fit the others.
    """
    biases = (gate_bias_E, up_bias_E, down_bias_E)
    in_out = weight_layout == "in_out"
    _check(x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, biases, gate_up_layout, in_out)
    spec = _spec(str(x_TH.dtype).removeprefix("torch."), activation, gate_up_layout != "none")
    try:
        kernel = dense_experts_kernel(spec)
    except KernelError as error:
        logger.warning("samoyeds::dense_experts runs without a kernel: %s", error)
        kernel = None
    if kernel is None or not all(lies_in_rows(weights, in_out) for weights in (gate_E, up_E, down_E) if weights):
        return _without_kernel(x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, *biases, activation,
                               gate_up_layout, weight_layout, out_dtype)  # fmt: skip
    return run_dense_kernel(kernel, x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, *biases,
                            gate_up_layout, weight_layout, out_dtype)  # fmt: skip


def run_dense_kernel(
    kernel: DenseExpertsKernel,
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    gate_up_layout: str,
    weight_layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """`dense_experts` with a kernel at hand."""
    in_out = weight_layout == "in_out"
    width, dim = in_width(down_E, in_out), -1 if in_out else -2
    up_bias_E = _bias(up_bias_E, out_width(up_E, in_out))
    gate, up = None, DenseMatrix(up_E, dim, 0, 1, width, up_bias_E)
    if gate_up_layout == "separate":
        gate = DenseMatrix(gate_E, dim, 0, 1, width, _bias(gate_bias_E, width))
    elif gate_up_layout == "concatenated":
        gate, up = up, DenseMatrix(up_E, dim, width, 1, width, up_bias_E)
    elif gate_up_layout == "interleaved":
        gate, up = (DenseMatrix(up_E, dim, first, 2, width, up_bias_E) for first in (0, 1))
    down = DenseMatrix(down_E, dim, 0, 1, x_TH.shape[1], _bias(down_bias_E, x_TH.shape[1]))
    out_TH = x_TH.new_empty(x_TH.shape, dtype=out_dtype if out_dtype in OUTPUTS else torch.float32)
    kernel(x_TH, expert_ids_TK, expert_weights_TK, gate, up, down, num_experts(up_E), out_TH)
    return out_TH.to(out_dtype)


@functools.lru_cache(maxsize=256)
def _spec(dtype: str, activation: str, gated: bool) -> DenseExpertsSpec:
    """The specification; checking it takes longer than the smallest block, so each is checked once."""
    return DenseExpertsSpec(dtype, activation, gated)


def _bias(bias_E: Tensor | None, width: int) -> Tensor | None:
    return None if bias_E is None else bias_E.expand(-1, width).contiguous()


def _without_kernel(
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
    out_dtype: torch.dtype,
) -> Tensor:
    plan, dtype = route(expert_ids_TK, num_experts(up_E)), x_TH.dtype
    h_SI = expert_up(x_TH, *plan, gate_E, up_E, gate_bias_E, up_bias_E, None, activation, gate_up_layout,
                     weight_layout, dtype)  # fmt: skip
    return expert_down(h_SI, *plan, down_E, down_bias_E, expert_weights_TK, weight_layout, dtype, out_dtype)


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
    if x_TH.device.type != "cpu" or x_TH.dim() != 2:
        raise bad_operand(op, "x", f"lies on {x_TH.device}, rank {x_TH.dim()}", "pass [T, H] on the CPU")
    if expert_ids_TK.shape != expert_weights_TK.shape or expert_ids_TK.shape[:-1] != x_TH.shape[:-1]:
        shapes = f"{list(expert_ids_TK.shape)} and {list(expert_weights_TK.shape)}"
        raise bad_operand(op, "expert_ids and expert_weights", f"have shapes {shapes}", "pass [T, K] both")
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


def _fake(x_TH: Tensor, *rest: object) -> Tensor:
    out_dtype = rest[-1]
    assert isinstance(out_dtype, torch.dtype)
    return x_TH.new_empty(x_TH.shape, dtype=out_dtype)


define_opaque(
    "dense_experts(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str activation, str gate_up_layout, str weight_layout, "
    "ScalarType out_dtype) -> Tensor",
    dense_experts,
    _fake,
)
