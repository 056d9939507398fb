"""Packed models through ``torch.compile``: their blocks run as one kernel in inference, and the report says so."""

import copy

import pytest
import torch
from torch import nn

from samoyeds_codegen.cpp.kernel import experts_kernel
from samoyeds_compile import Report, SparsityConfig, sparsify_
from tests.sparsity.experts_models import build, logits

CONFIG = SparsityConfig(1, 2, 32)


def packed_block(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=48, intermediate_size=80, num_local_experts=4)
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    sparsify_(block.to(dtype).eval(), CONFIG, method="magnitude", progress=False)
    return block


def compiled(model: nn.Module, base: str = "aot_eager", **options: object) -> tuple[nn.Module, Report]:
    report = Report()
    return torch.compile(model, backend="samoyeds", options={"report": report, "base": base, **options}), report


def kernels(report: Report) -> list[str]:
    return [kernel for graph in report.graphs for kernel in graph.kernels]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_models(name: str) -> None:
    """Gate and up in halves; alternating, with biases, stored transposed; no gate at all."""
    model, inputs = build(name)
    sparsify_(model.eval(), CONFIG, method="magnitude", progress=False)
    expected = logits(model, inputs)
    fast, report = compiled(copy.deepcopy(model))
    torch.testing.assert_close(logits(fast, inputs), expected, rtol=1e-4, atol=1e-4)
    assert kernels(report) and all(k.startswith("kernel of packed experts, float32 1:2:32") for k in kernels(report))
    assert "experts: kernel of packed experts" in str(report)


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_and_one_graph_for_all_lengths(dtype: torch.dtype) -> None:
    block = packed_block(dtype)
    fast, report = compiled(block, "inductor")
    for tokens in (3, 1, 7, 50):
        x = torch.randn(1, tokens, 48).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), block(x), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert len(report.graphs) <= 3  # static, dynamic, and the single token, which Dynamo keeps apart
    assert all(k.startswith("kernel") for k in kernels(report))
    with torch.inference_mode():
        assert fast(torch.randn(1, 3, 48, dtype=dtype)).shape == (1, 3, 48)


def test_weights_are_not_baked_in() -> None:
    """New values in the same graph; no second copy of the weights was made."""
    block, other = packed_block(), packed_block()
    fast, report = compiled(block)
    x = torch.randn(1, 5, 48)
    with torch.no_grad():
        fast(x)
        block.load_state_dict(other.state_dict())
        torch.testing.assert_close(fast(x), other(x), rtol=1e-4, atol=1e-5)
    assert len(report.graphs) == 1


def test_with_gradients_there_is_no_kernel() -> None:
    block = packed_block()
    fast, report = compiled(block)
    x = torch.randn(1, 5, 48, requires_grad=True)
    fast(x).sum().backward()
    got, x.grad = x.grad, None
    block(x).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-5)
    assert kernels(report) and all("gradients are enabled" in k for k in kernels(report))


def test_without_a_compiler_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = packed_block(), torch.randn(1, 5, 48)
    monkeypatch.setenv("CXX", "no-such-compiler")
    experts_kernel.cache_clear()
    fast, report = compiled(block)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), block(x), rtol=1e-4, atol=1e-5)
    assert all("CompilerNotFoundError: no-such-compiler" in k for k in kernels(report)) and kernels(report)
    assert "without a kernel" in str(report)
