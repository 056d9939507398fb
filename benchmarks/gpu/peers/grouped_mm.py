"""PyTorch's grouped product: the block as models of transformers write it, in eager mode and by Inductor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.gpu.contender import Absent, Bind, Call, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import DENSE, Weights


def block(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, up_EIH: Tensor, down_EHI: Tensor) -> Tensor:
    """Sort, gather, two grouped products, and the weighted sum of each token's rows."""
    top_k, experts = ids_TK.shape[1], up_EIH.shape[0]
    order = ids_TK.flatten().argsort(stable=True)
    counts = torch.histc(ids_TK.flatten().float(), bins=experts, min=0, max=experts - 1)
    ends = counts.cumsum(0).to(torch.int32)
    both = torch._grouped_mm(x_TH[order // top_k], up_EIH.mT, offs=ends)
    gate, up = both.chunk(2, dim=-1)
    rows = torch._grouped_mm(silu(gate) * up, down_EHI.mT, offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    weighted = rows[back].view(*ids_TK.shape, -1) * weights_TK.unsqueeze(-1).to(rows.dtype)
    return weighted.sum(1)


def _eager(shape: Shape, weights: Weights) -> Bind:
    return functools.partial(_bind, block, weights)


def _inductor(shape: Shape, weights: Weights) -> Bind:
    torch._dynamo.reset()
    return functools.partial(_bind, torch.compile(block, dynamic=True), weights)


def _bind(function: object, weights: Weights, inputs: Inputs) -> Call:
    if not hasattr(torch, "_grouped_mm"):
        raise Absent("torch has no _grouped_mm")
    assert callable(function)
    return functools.partial(function, inputs.x_TH, inputs.ids_TK, inputs.weights_TK, weights.up, weights.down)


EAGER = Contender("torch._grouped_mm", DENSE, _eager)
INDUCTOR = Contender("torch._grouped_mm, Inductor", DENSE, _inductor)
