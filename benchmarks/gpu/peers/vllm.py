"""vLLM's fused MoE in Triton, with its tuned configurations where it has some for the device and the shape."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.contender import Bind, Call, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.modules import module
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import DENSE, Weights


def _prepare(shape: Shape, weights: Weights) -> Bind:
    library = module("vllm.model_executor.layers.fused_moe.fused_moe", "vllm.model_executor.layers.fused_moe")

    def bind(inputs: Inputs) -> Call:
        ids = inputs.ids_TK.int()

        def call() -> Any:
            return library.fused_experts(inputs.x_TH, weights.up, weights.down, inputs.weights_TK, ids)

        return call

    return bind


PEER = Contender("vLLM fused MoE", DENSE, _prepare)
