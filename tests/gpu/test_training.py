"""Training by Triton kernels on a CUDA device: gradients, proofs, no synchronisation, compiled steps."""

from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.triton.gradients import plain
from samoyeds_codegen.triton.prove_gradients import prove_gradients
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import Pattern
from samoyeds_compile import Report, SparsityConfig
from tests.blocks import Block
from tests.codegen.triton.cases import spec_of
from tests.codegen.triton.training import IDS, block, case, check, check_frozen, check_packed, on
from tests.ops.operands import ACTIVATIONS, leaves_of, operands, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", [Form(), Form(False, bias=True), Form(transposed=True)], ids=str)
@pytest.mark.parametrize("separate", [False, True])
def test_kernels_prove_themselves(separate, form, dtype):
    spec = replace(plain(spec_of(dtype)), separate=separate)
    assert prove_gradients(spec, form, torch.device("cuda")) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", [Form(), Form(False, bias=True)], ids=str)
@pytest.mark.parametrize("pattern", [Pattern(1, 1, 32), Pattern(1, 2, 32), Pattern(1, 2, 128, 16), Pattern(2, 4, 64)])
def test_kernels_of_packed_weights_prove_themselves(pattern, form, dtype):
    assert prove_gradients(plain(spec_of(dtype, pattern)), form, torch.device("cuda")) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ACTIVATIONS)
def test_packed_weights(layout, dtype):
    check_packed(operands(1, 60, 2, 3, 72, 68, layout, "out_in", True, dtype), SparsityConfig(1, 2, 32), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_that_lie_apart(dtype):
    check(on("cuda", operands(1, 60, 2, 5, 72, 68, "separate", "out_in", True, dtype, separate="gate,up,down")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("layout", ACTIVATIONS)
def test_gradients(layout, weight_layout, dtype):
    nobody, several = torch.full((3, 2), -1), torch.randint(-1, 6, (300, 2))
    for ids in (IDS, IDS[:0], nobody, several):
        check(case(layout, weight_layout, dtype=dtype, ids=ids, device="cuda"))


@pytest.mark.parametrize("trained", [(0,), (2,), (3,), (4,), (5,), (6,), (7,), (8,), (0, 2), (3, 4, 5)], ids=str)
def test_frozen_operands(trained):
    args = case("separate", device="cuda")
    check_frozen(args, trained, results(block, args)[1:])


def test_same_bits_and_no_synchronisation():
    def once():
        leaves = leaves_of(args)
        return torch.autograd.grad(block(leaves).sum(), [leaves[0], leaves[2], leaves[4][0], leaves[5][0], leaves[7]])

    args = case(dtype=torch.bfloat16, ids=torch.randint(-1, 6, (300, 2)), device="cuda")
    first = once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("base", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_step(dtype, base):
    model, report = Block("gathered", hidden=64, width=96, experts=8, bias=True).to("cuda", dtype), Report()
    compiled = torch.compile(model, backend="samoyeds", options={"report": report, "base": base, "triton": True})

    def step(forward, x):
        out = forward(x)
        return [out, *torch.autograd.grad(out.float().square().mean(), list(model.parameters()))]

    for tokens in (1, 7, 300):
        x = torch.randn(tokens, 64, device="cuda", dtype=dtype)
        for mine, theirs in zip(step(compiled, x), step(model, x), strict=True):
            scale = float(theirs.abs().max()) + 1e-6
            torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=1e-3 if dtype.itemsize == 4 else 5e-2)
    assert "and its gradients" in str(report)
