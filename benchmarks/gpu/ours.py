"""This project's kernels: each kind on its own, and what is taken where all may be."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.gpu.contender import Absent, Bind, Call, Chosen, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.shapes import SWIGLU, Shape
from benchmarks.gpu.weights import DENSE, PATTERNS, Weights
from samoyeds_codegen.gpu.candidate import KINDS
from samoyeds_codegen.gpu.choose import choose
from samoyeds_codegen.gpu.cost import Block, cost
from samoyeds_codegen.gpu.device import device_of
from samoyeds_compile.lower.gpu import gpu_kernels
from samoyeds_compile.ops.experts_gpu import gpu_spec

MODEL, MEASURED = "cost model", "max-autotune"
"""Who takes one of all kernels that prove themselves; the end of the names of such contenders."""
KindsOf = Callable[[Weights, Inputs], str]
"""The kinds of kernels that may be taken, as `experts_gpu` wants them."""


def contenders() -> list[Contender]:
    """Every kind on its own; the cost model takes the tile. Dense weights have Triton kernels only."""
    pairs = [(DENSE, "triton")] + [(form, kind) for form in PATTERNS for kind in KINDS]
    return [_contender(form, kind, functools.partial(_only, kind)) for form, kind in pairs]


def choices() -> list[Contender]:
    """All kinds at a time, as a compiled model has them in its modes ``default`` and ``max-autotune``."""
    return [
        _contender(form, name, functools.partial(_proven, name == MEASURED))
        for form in (DENSE, *PATTERNS)
        for name in (MODEL, MEASURED)
    ]


def _contender(form: str, name: str, kinds_of: KindsOf) -> Contender:
    return Contender(f"{form}, {name}", form, functools.partial(_prepare, kinds_of), ours=True)


def _only(kind: str, weights: Weights, inputs: Inputs) -> str:
    return kind


def _proven(measure: bool, weights: Weights, inputs: Inputs) -> str:
    """Kinds that prove themselves on the device; with what was measured there for so many tokens, if it is to be.

    Raises:
        Absent: none does.
    """
    found = gpu_kernels(
        inputs.ids_TK, [], [weights.up], [weights.down], SWIGLU, "concatenated", "out_in", "output", inputs.x_TH.dtype,
        bias=False, measure=measure,
    )  # fmt: skip
    if not found.kinds:
        raise Absent(found.text)
    return found.kinds


def _prepare(kinds_of: KindsOf, shape: Shape, weights: Weights) -> Bind:
    def bind(inputs: Inputs) -> Chosen:
        kinds = kinds_of(weights, inputs)
        return _chosen(shape, weights, inputs, kinds, _call(weights, inputs, kinds))

    return bind


def _call(weights: Weights, inputs: Inputs, kinds: str) -> Call:
    dtype = inputs.x_TH.dtype

    def call() -> torch.Tensor:
        return torch.ops.samoyeds.experts_gpu(  # type: ignore[no-any-return]
            inputs.x_TH, inputs.ids_TK, inputs.weights_TK, [], [weights.up], [weights.down], None, None, None,
            SWIGLU, "concatenated", "out_in", "output", dtype, dtype, kinds,
        )  # fmt: skip

    return call


def _chosen(shape: Shape, weights: Weights, inputs: Inputs, kinds: str, call: Call) -> Chosen:
    """The call with what it will take, which the host knows.

    Raises:
        Absent: there is no such kernel.
    """
    spec = gpu_spec([], [weights.up], [weights.down], SWIGLU, "concatenated", "out_in", "output", inputs.x_TH.dtype)
    if isinstance(spec, str):
        raise Absent(spec)
    block, device = Block(shape.experts, shape.hidden, shape.width), device_of(inputs.x_TH.device)
    taken = choose(spec, block, inputs.slots, device, kinds)
    return Chosen(call, str(taken), round(cost(taken, spec, block, inputs.slots, device) * 1e3, 5))
