"""SonicMoE as a module: it has weights and a router of its own."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.contender import ROUTED, Bind, Call, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.modules import module
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import DENSE, Weights


def _prepare(shape: Shape, weights: Weights) -> Bind:
    library, enums = module("sonicmoe"), module("sonicmoe.enums")
    layer = library.MoE(
        num_experts=shape.experts, num_experts_per_tok=shape.top_k, hidden_size=shape.hidden,
        intermediate_size=shape.width, activation_function=enums.ActivationType.SWIGLU, add_bias=False, std=0.02,
    )  # fmt: skip
    layer = layer.to(weights.up.device, weights.up.dtype)

    def bind(inputs: Inputs) -> Call:
        def call() -> Any:
            return layer(inputs.x_TH, kernel_backend_moe=library.KernelBackendMoE.sonicmoe)[0]

        return call

    return bind


PEER = Contender("SonicMoE", DENSE, _prepare, work=ROUTED, checked=False)
