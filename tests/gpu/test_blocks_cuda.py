"""The same blocks on a CUDA device: forward and gradients against eager, and no host synchronisation in bf16."""

import pytest
import torch

from samoyeds_compile import Report
from tests.blocks import Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def on_cuda(style, dtype, **kwargs):
    return Block(style, hidden=64, width=96, experts=8, **kwargs).to("cuda", dtype)


def outputs_and_grads(model, forward, x):
    out = forward(x)
    return [out, *torch.autograd.grad(out.float().square().mean(), list(model.parameters()))]


@pytest.mark.parametrize("base", ["aot_eager", "inductor"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("style", ["grouped", "gathered"])
def test_block(style, dtype, bias, base):
    model, report = on_cuda(style, dtype, bias=bias), Report()
    compiled = torch.compile(model, backend="samoyeds", options={"report": report, "base": base})
    for tokens in (1, 7, 300):
        x = torch.randn(tokens, 64, device="cuda", dtype=dtype)
        pairs = zip(outputs_and_grads(model, compiled, x), outputs_and_grads(model, model, x), strict=True)
        for mine, theirs in pairs:
            scale = float(theirs.abs().max()) + 1e-6
            torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=TOLERANCE[dtype])
    assert all(b.rewritten for b in report.blocks)


def test_ops_do_not_synchronise():
    ops, dtype = torch.ops.samoyeds, torch.bfloat16
    x, ids = torch.randn(32, 64, device="cuda", dtype=dtype), torch.randint(0, 8, (32, 2), device="cuda")
    up, down = torch.randn(8, 192, 64, device="cuda", dtype=dtype), torch.randn(8, 64, 96, device="cuda", dtype=dtype)
    weights = torch.rand(32, 2, device="cuda", dtype=dtype)
    args = (x, ids, weights, [], [up], [down], None, None, None, "silu(gate) * up", "concatenated", "out_in", "output",
            dtype, None)  # fmt: skip
    ops.moe_experts(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.moe_experts(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    model = on_cuda("grouped", torch.bfloat16)
    compiled = torch.compile(model, backend="samoyeds", mode="reduce-overhead")
    x = torch.randn(16, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            torch.testing.assert_close(compiled(x), model(x), rtol=5e-2, atol=5e-2)
