"""``samoyeds::sparse_experts``: the whole block in one kernel that reads packed weights, for inference on a CPU.

The op on a CPU is C++ (`samoyeds_codegen.cpp.ops`), once that is loaded. What is here runs before, and where no
kernel is loaded for the operands: it loads one, or unpacks the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from samoyeds_codegen.cpp.kernel import experts_kernel
from samoyeds_codegen.cpp.spec import ExpertsSpec
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.ops.library import bad_operand
from samoyeds_compile.ops.moe_experts import moe_experts
from samoyeds_compile.ops.one_kernel import check_tokens, define_kernel_op
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import packed_shapes
from samoyeds_compile.sparsity.strips import fits
from samoyeds_compile.sparsity.tensor import Form, PackedTensor

logger = logging.getLogger(__name__)


def sparse_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    kernel: str,
    width: int,
    gate_up_layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """``moe_experts`` on packed weights.

    Where no kernel can be had (no compiler, say), the products unpack the weights, one expert after the other.

    Args:
        x_TH: tokens in the dtype of the weights.
        expert_ids_TK: integers; what is no expert contributes nothing.
        expert_weights_TK: routing weights; they multiply what the experts give.
        gate, up, down: storage (see `PackedWeight`), canonical or in strips, as the kernel says: values, metadata
            and, if n < m, selection; each as one stack [E, ...], or as a tensor for each expert, all values first.
            Gate only with layout ``separate``.
        gate_bias_E, up_bias_E, down_bias_E: [E, rows], in the dtype of the weights.
        kernel: pattern, dtype, order and activation, as `ExpertsSpec.name` writes them.
        width: I.
        gate_up_layout: one of `operands.GATE_UP_LAYOUTS`. Storage has all gate rows before all up rows also if it is
            ``interleaved``; the bias alternates then.
        out_dtype: of the result.

    Returns:
        [T, H].

    Raises:
        OperandError: an operand does not fit the others.
    """
    spec = ExpertsSpec.named(kernel)
    biases = (gate_bias_E, up_bias_E, down_bias_E)
    _check(x_TH, expert_ids_TK, expert_weights_TK, gate, up, down, biases, spec, width, gate_up_layout)
    try:
        experts_kernel(spec)
    except KernelError as error:
        logger.warning("samoyeds::sparse_experts runs without a kernel: %s", error)
        return _without_kernel(x_TH, expert_ids_TK, expert_weights_TK, gate, up, down, gate_bias_E, up_bias_E,
                               down_bias_E, spec, width, gate_up_layout, out_dtype)  # fmt: skip
    return torch.ops.samoyeds.sparse_experts(  # type: ignore[no-any-return]
        x_TH, expert_ids_TK, expert_weights_TK, gate, up, down, gate_bias_E, up_bias_E, down_bias_E, kernel,
        width, gate_up_layout, out_dtype,
    )  # fmt: skip


def _split(tensors: Sequence[Tensor], parts: int) -> Iterator[Sequence[Tensor]]:
    """Values, metadata and selection out of the flat list."""
    each = len(tensors) // parts
    return (tensors[i * each : (i + 1) * each] for i in range(parts))


def _experts(tensors: Sequence[Tensor], parts: int) -> int:
    return tensors[0].shape[0] if tensors[0].dim() == 3 else len(tensors) // parts


def _without_kernel(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    spec: ExpertsSpec,
    width: int,
    gate_up_layout: str,
    out_dtype: torch.dtype,
) -> Tensor:
    packed_rows = width if gate_up_layout in ("separate", "none") else 2 * width
    if gate_up_layout == "interleaved":
        gate_up_layout = "concatenated"
        up_bias_E = None if up_bias_E is None else torch.cat([up_bias_E[:, ::2], up_bias_E[:, 1::2]], dim=1)
    hidden = x_TH.shape[1]
    return moe_experts(
        x_TH, expert_ids_TK, expert_weights_TK, _wrapped(gate, spec, width, hidden),
        _wrapped(up, spec, packed_rows, hidden), _wrapped(down, spec, hidden, width), gate_bias_E, up_bias_E,
        down_bias_E, spec.activation, gate_up_layout, "out_in", "output", x_TH.dtype, out_dtype,
    )  # fmt: skip


def _config(spec: ExpertsSpec) -> SparsityConfig:
    return SparsityConfig(spec.n, spec.m, spec.vector, group=spec.group)


def _wrapped(tensors: Sequence[Tensor], spec: ExpertsSpec, rows: int, cols: int) -> list[Tensor]:
    """The matrices as packed tensors again."""
    values, metadata, *selection = _split(tensors, 3 if spec.n < spec.m else 2)
    choices = selection[0] if selection else [None] * len(values)
    form = Form(_config(spec), rows, cols, strips=spec.strips)
    return [PackedTensor(v, d, s, form) for v, d, s in zip(values, metadata, choices, strict=True)]


def _check(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    spec: ExpertsSpec,
    width: int,
    gate_up_layout: str,
) -> None:
    """Everything that a kernel takes for granted, as it would read beyond its operands."""
    op, hidden, config = "sparse_experts", x_TH.shape[-1], _config(spec)
    if spec.strips and not all(fits(*size, config, x_TH.dtype) for size in ((width, hidden), (hidden, width))):
        raise bad_operand(
            op, "kernel", "reads strips, and matrices are no whole ones", "pass the one for canonical rows"
        )
    check_tokens(op, x_TH, expert_ids_TK, expert_weights_TK)
    rows = 2 * width if gate_up_layout in ("concatenated", "interleaved") else width
    experts = _experts(up, 3 if config.n < config.m else 2)
    shapes_of = {"gate": (gate, width, hidden), "up": (up, rows, hidden), "down": (down, hidden, width)}
    for (name, (tensors, out, into)), bias in zip(shapes_of.items(), biases, strict=True):
        if name == "gate" and gate_up_layout != "separate":
            continue
        expected = _storage_shapes(experts, tensors[0].dim() == 3, out, into, config)
        if [tuple(t.shape) for t in tensors] != expected or tensors[0].dtype != x_TH.dtype:
            wanted = f"{x_TH.dtype} {expected[0]} and what belongs to it"
            raise bad_operand(op, name, f"is {tensors[0].dtype} {list(tensors[0].shape)}", f"pass {wanted}")
        if bias is not None and (bias.shape != (experts, out) or bias.dtype != x_TH.dtype):
            raise bad_operand(op, f"{name}_bias", f"is {bias.dtype} {list(bias.shape)}", f"pass [{experts}, {out}]")


def _storage_shapes(experts: int, stacked: bool, rows: int, cols: int, config: SparsityConfig) -> list[tuple[int, ...]]:
    """Shapes of the flat list that holds a projection."""
    found = [shape for shape in packed_shapes(rows, cols, config).values() if shape is not None]
    return [(experts, *shape) for shape in found] if stacked else [shape for shape in found for _ in range(experts)]


define_kernel_op("sparse_experts", "str kernel, int width, str gate_up_layout, ScalarType out_dtype", sparse_experts)
