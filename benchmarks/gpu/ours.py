"""This project's kernels: each kind on its own, and what the cost model takes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.gpu.contender import Bind, Call, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.shapes import SWIGLU, Shape
from benchmarks.gpu.weights import DENSE, PATTERNS, Weights
from samoyeds_codegen.gpu.candidate import KINDS


def contenders() -> list[Contender]:
    """Dense weights have Triton kernels only."""
    pairs = [(DENSE, "triton")] + [(form, kind) for form in PATTERNS for kind in KINDS]
    return [Contender(f"{form}, {kind}", form, functools.partial(_prepare, kind), ours=True) for form, kind in pairs]


def _prepare(kinds: str, shape: Shape, weights: Weights) -> Bind:
    def bind(inputs: Inputs) -> Call:
        def call() -> Any:
            return torch.ops.samoyeds.experts_gpu(
                inputs.x_TH, inputs.ids_TK, inputs.weights_TK, [], [weights.up], [weights.down], None, None, None,
                SWIGLU, "concatenated", "out_in", "output", inputs.x_TH.dtype, inputs.x_TH.dtype, kinds,
            )  # fmt: skip

        return call

    return bind
