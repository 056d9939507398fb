"""cuSPARSELt on 2:4 weights, one expert after the other, at equal output size; it only multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.contender import PRODUCTS, Absent, Bind, Call, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.sorting import padded_rows
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import Weights
from samoyeds_compile import PackedTensor

MULTIPLE = 16
"""Rows that the library takes are a multiple of this."""


def _compressed(weight: Tensor, expert: int) -> Tensor:
    assert isinstance(weight, PackedTensor)
    found: Tensor = torch._cslt_compress(weight[expert : expert + 1].to_dense()[0].contiguous())
    return found


def _prepare(shape: Shape, weights: Weights) -> Bind:
    if not torch.backends.cusparselt.is_available():
        raise Absent("this torch has no cuSPARSELt")
    pairs = [(_compressed(weights.up, e), _compressed(weights.down, e)) for e in range(shape.experts)]

    def bind(inputs: Inputs) -> Call:
        rows, ends = padded_rows(inputs, shape.experts, MULTIPLE)
        half = rows.new_zeros(rows.shape[0], shape.width)
        spans = [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start]

        def call() -> None:
            for e, start, end in spans:
                torch._cslt_sparse_mm(pairs[e][0], rows[start:end].t())
                torch._cslt_sparse_mm(pairs[e][1], half[start:end].t())

        return call

    return bind


PEER = Contender("cuSPARSELt", "2:4", _prepare, work=PRODUCTS, checked=False)
