"""Kernels compiled for GPUs that are not here: tensor cores are used, no register is spilled, shared memory is enough.

``make test-slow`` compiles all that may be chosen; the others are a few of each kind.
"""

import dataclasses
import importlib.util
import re

import pytest

from samoyeds_codegen.triton.assemble import CAPABILITIES, assemble, assemble_gradient, assemble_plan
from samoyeds_codegen.triton.select import backs, kernels
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not made for this machine"
)
PATTERNS = [None, Pattern(1, 1, 32), Pattern(1, 2, 32), Pattern(2, 4, 64)]
SMALLEST_SHARED = 99 * 1024
"""Bytes a program may have on sm_86, sm_89 and sm_120, which have the least of all since sm_80."""
PRODUCT = {80: ("HMMA.16816",), 90: ("HMMA.16816", "HGMMA"), 100: ("HMMA.16816", "UTCHMMA")}


def experts(dtype="bfloat16", pattern=None, activation="silu(gate) * up"):
    return ExpertsSpec(dtype, pattern, activation, "gate" in activation)


def check(spec, capability, **options):
    found = assemble(spec, capability, **options)
    assert found.stack == 0 and not re.search(r"\b(STL|LDL)\b", found.sass), f"{spec} spills {found.stack} B"
    assert found.shared <= SMALLEST_SHARED
    products = PRODUCT[capability] if spec.experts.dtype != "float32" else ("FFMA",)
    assert any(name in found.sass for name in products)
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gated(pattern, capability):
    """The largest first projection needs the most registers."""
    spec = [k for k in kernels(experts(pattern=pattern)) if k.op == "up"][-1]
    found = check(spec, capability, bias=True)
    assert "LDG.E.128" in found.sass or "LDGSTS.E" in found.sass
    assert (capability == 80) or spec.tile.rows < 64 or "GMMA" in found.sass or "UTCHMMA" in found.sass


@pytest.mark.parametrize("spec", [k for k in kernels(experts("float16", PATTERNS[2])) if k.op == "down"], ids=str)
def test_down(spec):
    check(spec, 90)


def test_transposed_weights():
    check(kernels(experts())[0], 90, contiguous="row")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("mask", [False, True])
def test_gradient(mask, capability):
    found = assemble_gradient("bfloat16", capability, mask)
    assert found.stack == 0 and found.shared <= SMALLEST_SHARED
    assert any(name in found.sass for name in PRODUCT[capability])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=str)
def test_products_by_packed_weights_themselves(pattern, separate, capability):
    for spec in backs(dataclasses.replace(experts(pattern=pattern), separate=separate)):
        found = check(spec, capability)
        assert "LDG.E.128" in found.sass or "LDGSTS.E" in found.sass


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_rows_that_were_gathered(pattern):
    """Without an order there is another text to compile."""
    spec = next(k for k in kernels(experts(pattern=pattern)) if k.op == "up")
    check(spec, 90, bias=True, gathered=True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("pattern", [None, PATTERNS[2]], ids=str)
@pytest.mark.parametrize("op", ["up", "down"])
def test_matrices_that_lie_apart(op, pattern, capability):
    """As many bytes at once as of a stack: a table counts in units that the compiler knows."""
    largest = [k for k in kernels(dataclasses.replace(experts(pattern=pattern), separate=True)) if k.op == op][-1]
    found = check(largest, capability)
    wide = re.compile(r"LDGSTS\.E\.\S*128|LDG\.E\.\S*128")
    stacked = assemble(dataclasses.replace(largest, experts=experts(pattern=pattern)), capability)
    assert len(wide.findall(found.sass)) >= len(wide.findall(stacked.sass)) > 0


def test_plan():
    for found in assemble_plan(90).values():
        assert found.stack == 0 and found.shared <= SMALLEST_SHARED


def test_float32_is_exact():
    """No TF32: the products are fused multiply-adds."""
    assert "HMMA" not in check(kernels(experts("float32"))[0], 90).sass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(1, 2, 128), Pattern(1, 2, 16), Pattern(2, 4, 32, 16)], ids=str)
def test_all_that_may_be_chosen(pattern, dtype):
    for activation in ("silu(gate) * up", "gelu(x)"):
        block = experts(dtype, pattern, activation)
        for spec in (*kernels(block), *(backs(block) if pattern else ())):
            for capability in CAPABILITIES:
                check(spec, capability, bias=True)
