"""``samoyeds::gpu_experts``: the whole block by generated kernels, Triton or CUDA, on a CUDA device.

Routing plan, first projection with its gather and activation, second projection, weighted sum: four launches in CUDA.
In Triton the plan is that of `route` and a list of tiles. Nothing waits for the device, so a CUDA graph can hold it.
Under Triton's interpreter it runs on CPU tensors. Its derivative is `gpu_experts_backward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.expr import GATED_NAMES
from samoyeds_codegen.gpu.device import device_of
from samoyeds_codegen.triton.matrices import apart
from samoyeds_codegen.triton.operands import DenseSide, PackedSide, Side, Stack
from samoyeds_codegen.triton.prove import on
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern
from samoyeds_compile.ops.library import bad_operand, define_opaque
from samoyeds_compile.ops.operands import check_weights
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import packed_shapes

OP = "gpu_experts"
BOTH = ("concatenated", "interleaved")
"""Layouts in which one parameter has gate and up."""
OUT_DTYPE = 13
"""Position of this argument."""


def gpu_experts(
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
    weight_layout: str,
    out_dtype: torch.dtype,
    kinds: str,
    gathers: int = 0,
) -> Tensor:
    """``moe_experts`` whose routing weights multiply what the experts give.

    Args:
        x_TH: tokens in the dtype of the weights.
        expert_ids_TK: integers; what is no expert contributes nothing.
        expert_weights_TK: routing weights.
        gate, up, down: a dense stack each, or matrices of all experts (if one operand is, all are read so). Of packed
            ones the canonical storage (see `PackedWeight`): the values of all, then their metadata and, if n < m,
            their selections. Gate only with layout ``separate``.
        gate_bias_E, up_bias_E, down_bias_E: [E, rows] or [E, 1], floating.
        kernel: dtype, pattern and activation, as `ExpertsSpec.name` of Triton writes them.
        width: I.
        gate_up_layout: one of `operands.GATE_UP_LAYOUTS`. Packed storage has all gate rows before all up rows also if
            it is ``interleaved``; the bias alternates then.
        weight_layout: one of `operands.WEIGHT_LAYOUTS`, of dense weights.
        out_dtype: of the result.
        kinds: which kinds of kernels may be taken, by `gpu.candidate.KINDS`, separated by spaces; with ``tuned`` among
            them, results that were measured on the device decide between them.
        gathers: the plan of layouts: bit b says whether calls of 2^b slots, rounded up, copy the rows of tokens to
            slots in a pass of their own. Kernels without such a choice gather while they load.

    Raises:
        OperandError: an operand does not fit the others.
        KernelError: no kernel of these kinds can be loaded.
    """
    # These load sympy, which takes longer to import than the rest of the package.
    from samoyeds_codegen.gpu.choose import choose, regime
    from samoyeds_codegen.gpu.cost import Block
    from samoyeds_compile.ops.gpu_call import Call, by_cuda, by_triton

    spec = ExpertsSpec.named(kernel)
    wholes = whole_sides(
        OP, spec, x_TH, expert_ids_TK, expert_weights_TK, gate, up, down, gate_bias_E, up_bias_E, down_bias_E, width,
        gate_up_layout, weight_layout,
    )  # fmt: skip
    last, experts, hidden = wholes["down"], wholes["down"].experts, x_TH.shape[1]
    sides = {name: side for name, side in wholes.items() if name != "down"}
    if gate_up_layout in BOTH:
        sides = {name: wholes["up"].half(i, gate_up_layout == "interleaved") for i, name in enumerate(GATED_NAMES)}
    x, device = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous(), device_of(x_TH.device)
    slots = expert_ids_TK.numel()
    candidate = choose(spec, Block(experts, hidden, width), slots, device, kinds)
    call = Call(
        spec, candidate, device, experts, x, expert_ids_TK, expert_weights_TK, sides, last, width, out_dtype,
        bool(gathers & regime(slots)),
    )  # fmt: skip
    with on(x.device):
        return by_cuda(call) if candidate.tiles is None else by_triton(call)


def whole_sides(
    op: str,
    spec: ExpertsSpec,
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    width: int,
    gate_up_layout: str,
    weight_layout: str,
) -> dict[str, Side]:
    """The parameters of a block as kernels read them, by name; one that has gate and up is ``up``, whole.

    Args:
        op: that checks its operands.
        spec: the block; all else as `gpu_experts` takes it.

    Raises:
        OperandError: an operand does not fit the others.
    """
    _check_rows(op, x_TH, expert_ids_TK, expert_weights_TK)
    in_out, hidden = weight_layout == "in_out", x_TH.shape[1]
    biases = {"gate": gate_bias_E, "up": up_bias_E, "down": down_bias_E}
    stored = {"gate": gate, "up": up, "down": down} if gate_up_layout == "separate" else {"up": up, "down": down}
    rows = {"gate": width, "up": 2 * width if gate_up_layout in BOTH else width, "down": hidden}
    parts = {name: _parts(op, name, given, spec.pattern) for name, given in stored.items()}
    weights = _apart(op, parts) if spec.separate else {name: [of[0] for of in found] for name, found in parts.items()}
    wholes = {name: _side(spec, found, biases[name], rows[name], in_out) for name, found in weights.items()}
    for name, side in wholes.items():
        _check_side(
            op, name, side, (wholes["down"].experts, rows[name], width if name == "down" else hidden), spec, x_TH
        )
    return wholes


def _parts(op: str, name: str, given: Sequence[Tensor], pattern: Pattern | None) -> list[Sequence[Tensor]]:
    """The tensors of an operand by what they are: weights, or values, metadata and selections."""
    count = 1 if pattern is None else 3 if pattern.selects else 2
    each, rest = divmod(len(given), count)
    if not each or rest:
        raise bad_operand(op, name, f"has {len(given)} tensors", f"pass {count} for a stack, or for each matrix")
    return [given[i * each : (i + 1) * each] for i in range(count)]


def _apart(op: str, parts: Mapping[str, list[Sequence[Tensor]]]) -> dict[str, list[Stack]]:
    """Matrices that lie apart, with one table for all of them."""
    operands = [of for found in parts.values() for of in found]
    for name, found in parts.items():
        for of in found:
            check_weights(op, name, of)
    try:
        placed = iter(apart(*operands))
    except UnsupportedSpecError as error:
        raise bad_operand(op, "/".join(parts), str(error), "use moe_experts") from error
    return {name: [next(placed) for _ in found] for name, found in parts.items()}


def _side(spec: ExpertsSpec, stored: Sequence[Stack], bias: Tensor | None, rows: int, in_out: bool) -> Side:
    if bias is not None:
        bias = bias.expand(-1, rows)
    if spec.pattern is None:
        return DenseSide(stored[0].mT if in_out else stored[0], bias)
    selection = stored[2] if spec.pattern.selects else None
    return PackedSide(stored[0], stored[1], selection, spec.pattern, rows, 0, bias)


def _check_rows(op: str, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
    if x_TH.dim() != 2:
        raise bad_operand(op, "x", f"has rank {x_TH.dim()}", "pass [T, H]")
    if ids_TK.shape != weights_TK.shape or ids_TK.dim() != 2 or ids_TK.shape[0] != x_TH.shape[0]:
        shapes = f"{list(ids_TK.shape)} and {list(weights_TK.shape)}"
        raise bad_operand(op, "expert_ids and expert_weights", f"have shapes {shapes}", "pass [T, K] both")


def _check_side(op: str, name: str, side: Side, shape: tuple[int, int, int], spec: ExpertsSpec, x_TH: Tensor) -> None:
    """Everything that a kernel takes for granted, as it would read beyond its operands."""
    found = {part: tuple(tensor.shape) for part, tensor in side.stored.items()}
    wanted, (dtype, *_) = _shapes(spec.pattern, *shape), [tensor.dtype for tensor in side.stored.values()]
    if found != wanted or dtype != x_TH.dtype or str(dtype) != f"torch.{spec.dtype}":
        raise bad_operand(op, name, f"is {dtype} {found}", f"pass {spec.dtype} {wanted}, and rows of that dtype")
    if side.bias is not None and side.bias.shape != shape[:2]:
        raise bad_operand(op, f"{name}_bias", f"has shape {tuple(side.bias.shape)}", f"pass {shape[:2]}")
    if any(tensor.device != x_TH.device for tensor in side.stored.values()):
        raise bad_operand(op, name, f"is not on {x_TH.device}", "move all operands to one device")


def _shapes(pattern: Pattern | None, experts: int, rows: int, cols: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what a kernel reads of a side of so many rows and columns."""
    if pattern is None:
        return {"weight": (experts, rows, cols)}
    config = SparsityConfig(pattern.n, pattern.m, pattern.vector, group=pattern.group)
    stored = packed_shapes(rows, cols, config)
    return {name: (experts, *sizes) for name, sizes in stored.items() if sizes is not None}


def _fake(x_TH: Tensor, *rest: object) -> Tensor:
    out_dtype = rest[OUT_DTYPE - 1]
    assert isinstance(out_dtype, torch.dtype)
    return x_TH.new_empty(x_TH.shape, dtype=out_dtype)


define_opaque(
    f"{OP}(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str kernel, int width, str gate_up_layout, "
    "str weight_layout, ScalarType out_dtype, str kinds, int gathers=0) -> Tensor",
    gpu_experts,
    _fake,
)
