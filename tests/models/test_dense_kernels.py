"""Families of transformers with dense weights through ``torch.compile``: one kernel a block in inference."""

import pytest
import torch
from torch import nn

from samoyeds_codegen.cpp.kernel import experts_kernel
from samoyeds_compile import Report
from tests.sparsity.experts_models import build, logits


def compiled(model: nn.Module, base: str = "aot_eager", **options: object) -> tuple[nn.Module, Report]:
    report = Report()
    return torch.compile(model, backend="samoyeds", options={"report": report, "base": base, **options}), report


def kernels(report: Report) -> set[str]:
    return {kernel for graph in report.graphs for kernel in graph.kernels}


@pytest.mark.parametrize(
    ("name", "activation"),
    [("mixtral", "swiglu"), ("qwen3_moe", "swiglu"), ("deepseek_v3", "swiglu"), ("nemotron_h", "relu2")],
)
def test_models(name: str, activation: str) -> None:
    """Many experts, shared ones beside them, no gate at all: equal to eager, one graph, and the report says by what."""
    model, inputs = build(name)
    expected = logits(model.eval(), inputs)
    fast, report = compiled(model)
    torch.testing.assert_close(logits(fast, inputs), expected, rtol=1e-4, atol=1e-4)
    (kernel,) = kernels(report)
    assert kernel.startswith(f"kernel of dense experts, float32 {activation}, ") and len(report.graphs) == 1
    assert f"experts: {kernel}" in str(report)


def test_transposed_stacks() -> None:
    """[E, in, out], gate and up in turns, with biases: a kernel for a number of tokens that is known to be small."""
    model, inputs = build("gpt_oss")
    few = {name: value[:1, :2] for name, value in inputs.items()}
    many = {name: value.repeat(40, 1) for name, value in inputs.items()}
    model.eval()
    for given, starts in ((few, "kernel of dense experts, float32 "), (many, "without a kernel, products are")):
        torch._dynamo.reset()
        fast, report = compiled(model)
        torch.testing.assert_close(logits(fast, given), logits(model, given), rtol=1e-4, atol=1e-4)
        (kernel,) = kernels(report)
        assert kernel.startswith(starts) and ("by columns" in kernel or "[in, out]" in kernel)


def test_transposed_stacks_with_a_symbolic_number_of_tokens() -> None:
    """It may become large, then the call takes PyTorch's products; `tests/layout/test_propagate.py` counts them."""
    model, inputs = build("gpt_oss")
    torch._dynamo.reset()
    fast, report = compiled(model.eval())
    for tokens, batch in ((5, 1), (3, 1), (7, 60)):
        given = {name: value[:, :tokens].repeat(batch, 1) for name, value in inputs.items()}
        for value in given.values():
            torch._dynamo.mark_dynamic(value, 1)
        torch.testing.assert_close(logits(fast, given), logits(model, given), rtol=1e-4, atol=1e-4)
    (kernel,) = kernels(report)
    assert kernel.startswith("kernel of dense experts, float32 ") and "by columns" in kernel


def block(dtype: torch.dtype) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=48, intermediate_size=80, num_local_experts=4)
    config._experts_implementation = "grouped_mm"
    made = MixtralSparseMoeBlock(config)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made.to(dtype).eval()


@pytest.mark.inductor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_and_one_graph_for_all_lengths(dtype: torch.dtype) -> None:
    model = block(dtype)
    fast, report = compiled(model, "inductor")
    for tokens in (3, 1, 7, 50):
        x = torch.randn(1, tokens, 48).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert len(report.graphs) <= 3  # static, dynamic, and the single token, which Dynamo keeps apart
    assert all(k.startswith("kernel of dense experts") for k in kernels(report))
    with torch.inference_mode():
        assert fast(torch.randn(1, 3, 48, dtype=dtype)).shape == (1, 3, 48)


def test_weights_are_not_baked_in() -> None:
    model, other = block(torch.float32), block(torch.float32)
    fast, report = compiled(model)
    x = torch.randn(1, 5, 48)
    with torch.no_grad():
        fast(x)
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(fast(x), other(x), rtol=1e-4, atol=1e-5)
    assert len(report.graphs) == 1


def test_with_gradients_there_is_no_kernel() -> None:
    model = block(torch.float32)
    fast, report = compiled(model)
    x = torch.randn(1, 5, 48, requires_grad=True)
    fast(x).sum().backward()
    got, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-5)
    assert kernels(report) and all("gradients are enabled" in k for k in kernels(report))


def test_without_a_compiler_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = block(torch.float32), torch.randn(1, 5, 48)
    monkeypatch.setenv("CXX", "no-such-compiler")
    experts_kernel.cache_clear()
    fast, report = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert kernels(report) and all("CompilerNotFoundError: no-such-compiler" in k for k in kernels(report))
