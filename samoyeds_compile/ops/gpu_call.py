"""A call of `gpu_experts` whose kernels are chosen: what is launched, by Triton or through the CUDA driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_codegen.cuda.block import Experts, Routing, plan_block
from samoyeds_codegen.cuda.launch import run
from samoyeds_codegen.cuda.operands import Projection
from samoyeds_codegen.expr import GATED_NAMES
from samoyeds_codegen.gpu.candidate import Candidate, cuda_pattern, cuda_target, variant_of
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.gpu.weights import matrix
from samoyeds_codegen.triton.kernel import combine, gather, projection, work_list
from samoyeds_codegen.triton.operands import Side
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec
from samoyeds_compile.ops.route import route

SUMMED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of routing weights and results that CUDA kernels know; others go through the first."""


@dataclass(frozen=True)
class Call:
    """Everything that kernels need.

    Attributes:
        spec: the block.
        candidate: what computes it.
        device: on which.
        experts: E.
        x: tokens [T, H], columns contiguous.
        ids_TK: expert ids, of any integer dtype.
        weights_TK: routing weights.
        sides: the weights of the first projection, by name.
        down: those of the second.
        width: I.
        out_dtype: of the result.
        gathered: whether rows are copied to slots before the first projection of Triton, not read by their order.
    """

    spec: ExpertsSpec
    candidate: Candidate
    device: Device
    experts: int
    x: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    sides: Mapping[str, Side]
    down: Side
    width: int
    out_dtype: torch.dtype
    gathered: bool = False


def by_triton(call: Call) -> Tensor:
    """The block by Triton kernels."""
    tiles, x, spec = call.candidate.tiles, call.x, call.spec
    assert tiles is not None
    plan = route(call.ids_TK, call.experts)
    slots, top_k = plan.order_S.shape[0], plan.slot_TK.shape[1]
    h_SI, y_SH = x.new_empty(slots, call.width), x.new_empty(slots, x.shape[1])
    out_TH = x.new_empty(x.shape, dtype=call.out_dtype)
    work = work_list(plan.offsets_E, slots, tiles.slots)
    up = projection(KernelSpec("up", spec, tiles.up))
    if call.gathered:
        up(gather(x, plan.order_S, top_k, plan.offsets_E), None, 1, work, call.sides, h_SI)
    else:
        up(x, plan.order_S, top_k, work, call.sides, h_SI)
    projection(KernelSpec("down", spec, tiles.down))(h_SI, plan.order_S, top_k, work, {"down": call.down}, y_SH)
    combine(y_SH, plan.slot_TK, call.weights_TK, plan.offsets_E, out_TH)
    return out_TH


def by_cuda(call: Call) -> Tensor:
    """The block by CUDA kernels."""
    first = [matrix(call.sides[name]) for name in (GATED_NAMES if call.spec.gated else ("up",))]
    hidden, ids = call.x.shape[1], call.ids_TK
    up = Projection(call.width, hidden, *first)
    down = Projection(hidden, call.width, matrix(call.down))
    experts = Experts(cuda_pattern(call.spec), call.spec.activation, call.spec.gated, up, down)
    weights = call.weights_TK if call.weights_TK.dtype in SUMMED else call.weights_TK.float()
    routing = Routing(ids if ids.dtype in (torch.int32, torch.int64) else ids.long(), weights)
    target = cuda_target(call.candidate.kind, call.device.capability)
    out_dtype = call.out_dtype if call.out_dtype in SUMMED else torch.float32
    block = plan_block(
        call.x, experts, routing, target, call.device.processors, out_dtype, call.candidate.slots,
        variant_of(call.candidate.kind),
    )  # fmt: skip
    run(block.launches, call.x.device)
    return block.out_TH.to(call.out_dtype)
