"""OpenAI's triton_kernels, as vLLM ships it: two ragged products with gather, fused SwiGLU and scatter.

Its SwiGLU takes gate and up from alternate columns and adds 1 to up, so its result is another one; the work is equal.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.contender import Absent, Bind, Call, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.peers.modules import module
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import DENSE, Weights

ROOTS = ("triton_kernels", "vllm.third_party.triton_kernels")


def _part(name: str) -> Any:
    return module(*(f"{root}.{name}" for root in ROOTS))


def _prepare(shape: Shape, weights: Weights) -> Bind:
    products, swiglu, routing = _part("matmul_ogs"), _part("swiglu"), _part("routing")
    if not hasattr(products, "FusedActivation"):
        raise Absent("this triton_kernels has no FusedActivation")
    specs = products.FnSpecs("swiglu", swiglu.swiglu_fn, ("alpha", "limit"))
    activation = products.FusedActivation(specs, (1.0, None), 2)
    up, down = weights.up.mT, weights.down.mT

    def bind(inputs: Inputs) -> Call:
        logits = inputs.x_TH.new_full((inputs.ids_TK.shape[0], shape.experts), -1e4)
        logits.scatter_(1, inputs.ids_TK, inputs.weights_TK.log().to(logits.dtype))

        def call() -> Any:
            data, gather, scatter = routing.routing(logits, shape.top_k)
            rows = products.matmul_ogs(
                inputs.x_TH, up, None, data, gather_indx=gather, fused_activation=activation
            )  # fmt: skip
            return products.matmul_ogs(rows, down, None, data, scatter_indx=scatter, gammas=data.gate_scal)

        return call

    return bind


PEER = Contender("triton_kernels matmul_ogs", DENSE, _prepare, checked=False)
