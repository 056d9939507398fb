"""Generated Triton kernels on a CUDA device: the interpreter's cases, the proof, a CUDA graph, a compiled model."""

import copy

import pytest
import torch

from samoyeds_codegen.triton.gradients import row_gradient, weight_gradient
from samoyeds_codegen.triton.operands import DenseSide
from samoyeds_codegen.triton.prove import prove
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.select import candidates
from samoyeds_codegen.triton.spec import Pattern
from samoyeds_compile import Report, SparsityConfig, densify_, sparsify_
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.route import route
from tests.codegen.triton.cases import Experts, check, spec_of
from tests.gpu.models import mixtral
from tests.ops.operands import operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PATTERNS = [None, Pattern(1, 1, 32), Pattern(1, 2, 32), Pattern(1, 2, 128, 16), Pattern(2, 4, 64)]
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_kernels_prove_themselves(pattern, dtype):
    for form in (Form(), Form(aligned=False, bias=True), Form(transposed=True, interleaved=True)):
        assert prove(spec_of(dtype, pattern), form, torch.device("cuda")) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("hidden", "width"), [(512, 384), (75, 44)])
def test_block(pattern, dtype, hidden, width):
    case = Experts(spec_of(dtype, pattern), experts=6, hidden=hidden, width=width, bias=True, device="cuda")
    for tiles in candidates(case.spec):
        for tokens in (0, 1, 9, 300):
            check(case, tokens=tokens, top_k=2, up_tile=tiles.up, down_tile=tiles.down)


@torch.no_grad()
@pytest.mark.parametrize("separate", ["", "up,down"], ids=["stack", "matrices"])
def test_same_bits_in_a_cuda_graph(separate):
    """Captured with one routing and replayed with another; no call waits for the device."""
    args = operands(0, 40, 2, 4, 64, 96, "concatenated", "out_in", True, torch.bfloat16, separate=separate)
    args = [[t.cuda() for t in a] if isinstance(a, list) else a.cuda() if torch.is_tensor(a) else a for a in args]

    def call():
        return torch.ops.samoyeds.experts_gpu(*args, torch.bfloat16, None)

    for _ in range(2):
        call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for ids in (args[1].flip(0), torch.zeros_like(args[1]), torch.full_like(args[1], -1)):
        args[1].copy_(ids)
        graph.replay()
        assert torch.equal(captured, call())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype):
    plan = route(torch.randint(-1, 5, (300, 1), device="cuda"), 4)
    weight = (torch.randn(4, 96, 160, device="cuda") / 13).to(dtype)
    x, grad = torch.randn(300, 160, device="cuda").to(dtype), torch.randn(300, 96, device="cuda").to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    y = reference.expert_linear(leaves[0], [leaves[1]], plan.offsets_E, False)
    expected = torch.autograd.grad(y, leaves, grad.double())
    found = torch.zeros_like(x), torch.full_like(weight, float("nan"))
    row_gradient(grad, None, 1, DenseSide(weight), plan.offsets_E, found[0])
    weight_gradient(grad, x, None, 1, plan.offsets_E, None, found[1])
    for mine, theirs in zip(found, expected, strict=True):
        limit = (1e-5 if dtype == torch.float32 else 1e-2) * float(theirs.abs().max())
        assert float((mine.double() - theirs).abs().max()) <= limit


@pytest.mark.parametrize("sparse", [False, True])
def test_compiled_model_uses_them(sparse):
    model, report = mixtral().to("cuda", torch.bfloat16).eval(), Report()
    tokens = torch.randint(128, (2, 48), device="cuda")
    if sparse:
        sparsify_(model, SparsityConfig(1, 2, 32), method="magnitude", progress=False)
    dense = copy.deepcopy(model)
    densify_(dense)
    with torch.no_grad():
        compiled = torch.compile(model, backend="samoyeds", options={"report": report, "triton": True})
        found, expected = compiled(tokens).logits.float(), dense(tokens).logits.float()
    assert "kernels of bfloat16" in str(report)
    assert float((found - expected).abs().max()) <= 5e-2 * float(expected.abs().max())
