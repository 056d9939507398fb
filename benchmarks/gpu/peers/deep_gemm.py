"""DeepGEMM's grouped bfloat16 products on rows that lie ready in the order of experts; nothing else of the block."""

from __future__ import annotations

import torch

from benchmarks.gpu.contender import PRODUCTS, Bind, Call, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.modules import module
from benchmarks.gpu.peers.sorting import padded_rows
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import DENSE, Weights

ALIGNMENT = 128
"""Rows of an expert are padded to this; the library names the number by a function that differs between versions."""


def _prepare(shape: Shape, weights: Weights) -> Bind:
    library = module("deep_gemm", "vllm.third_party.deep_gemm")

    def bind(inputs: Inputs) -> Call:
        rows, ends = padded_rows(inputs, shape.experts, ALIGNMENT)
        counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        experts = torch.arange(shape.experts, dtype=torch.int32).repeat_interleave(torch.tensor(counts)).to(rows.device)
        both = rows.new_empty(rows.shape[0], 2 * shape.width)
        half, out = rows.new_zeros(rows.shape[0], shape.width), torch.empty_like(rows)

        def call() -> None:
            library.m_grouped_bf16_gemm_nt_contiguous(rows, weights.up, both, experts)
            library.m_grouped_bf16_gemm_nt_contiguous(half, weights.down, out, experts)

        return call

    return bind


PEER = Contender("DeepGEMM", DENSE, _prepare, work=PRODUCTS, checked=False)
