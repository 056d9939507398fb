"""Random specifications of kernels, each with random shapes and routings, against float64.

A few run with the others; ``-m slow`` runs many. ``SAMOYEDS_FUZZ_SEED`` chooses others.
"""

import os
import random

import pytest
import torch
from torch import Tensor

from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_codegen.cpp.kernel import ExpertsKernel
from samoyeds_codegen.cpp.spec import DTYPES, PATTERNS, VECTORS, DenseExpertsSpec, ExpertsSpec
from samoyeds_compile.sparsity import SparsityConfig
from tests.ops import test_dense_experts as dense_tests
from tests.ops import test_sparse_experts as packed_tests
from tests.ops.operands import ACTIVATIONS, operands

SEED = int(os.environ.get("SAMOYEDS_FUZZ_SEED", "0"))
GATED = (
    "silu(gate) * up", "gelu(gate) * up", "tanh(gate) * (up + 1)", "clamp(silu(gate), None, 2.0) * up",
    ACTIVATIONS["interleaved"],
)  # fmt: skip
PLAIN = ("square(relu(x))", "gelu(x, 'tanh')", "x * sigmoid(x)", "x")
GROUPS = (1, 1, 2, 3, 16, 32, 64)
CALLS = 25
"""Of each kernel."""
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""Relative to the norm; small sums that cancel are less exact than those of the other tests."""


def kernel(rng: random.Random, layout: str) -> ExpertsKernel:
    """A random one, for a random instruction set of this machine."""
    dtype, activation = rng.choice(DTYPES), rng.choice(PLAIN if layout == "none" else GATED)
    isa = rng.choice(usable_isas(dtype))
    if rng.random() < 0.3:
        spec = DenseExpertsSpec(dtype, activation, layout != "none", rng.random() < 0.5)
    else:
        pattern, vector, group = rng.choice(PATTERNS), rng.choice(VECTORS), rng.choice(GROUPS)
        strips = (group == 1 or group * pattern[0] % 16 == 0) and rng.random() < 0.6
        spec = ExpertsSpec(dtype, *pattern, vector, group, activation, layout != "none", strips)
    return ExpertsKernel(spec, isa, packed_tests.FLAGS)


def call(rng: random.Random, made: ExpertsKernel, layout: str) -> tuple[Tensor, Tensor]:
    """What a kernel gives for random operands, and what it should give."""
    spec, dtype = made.spec, getattr(torch, made.spec.dtype)
    tokens, experts = rng.choice((0, 1, 2, rng.randrange(3, 20), rng.randrange(20, 200))), rng.randrange(1, 9)
    sizes = (rng.randrange(1, 160), rng.randrange(1, 160))
    if isinstance(spec, ExpertsSpec):  # rows in fours, for blocks of rows and for groups of columns
        whole = max(32, spec.m * spec.group) if spec.strips else 4
        sizes = tuple(whole * (size // whole + 1) for size in sizes)
    weight_layout = "in_out" if isinstance(spec, DenseExpertsSpec) and spec.by_columns else "out_in"
    args = operands(
        rng.randrange(2**31), tokens, rng.randrange(1, 5), experts, *sizes, layout, weight_layout,
        rng.random() < 0.5, dtype, separate=rng.choice(("", "gate,up,down")),
    )  # fmt: skip
    args[9] = spec.activation
    if rng.random() < 0.2 and tokens:
        args[1].fill_(rng.randrange(experts))  # one expert has all tokens
    if isinstance(spec, DenseExpertsSpec):
        return dense_tests.run(made, args), dense_tests.expected_of(args)
    dense, packed = packed_tests.packed_operands(args, SparsityConfig(spec.n, spec.m, spec.vector, group=spec.group))
    return packed_tests.run(made, packed), packed_tests.expected_of(dense)


@pytest.mark.parametrize("number", [*range(4), *(pytest.param(n, marks=pytest.mark.slow) for n in range(4, 60))])
def test_random_kernels(number: int) -> None:
    rng = random.Random(1000 * SEED + number)
    layout = rng.choice(list(ACTIVATIONS))
    made = kernel(rng, layout)
    dtype = getattr(torch, made.spec.dtype)
    for _ in range(CALLS):
        state = rng.getstate()
        found, expected = call(rng, made, layout)
        assert packed_tests.error(found, expected) <= TOLERANCE[dtype], (made.spec, made.isa.name, layout, state[1][-1])
