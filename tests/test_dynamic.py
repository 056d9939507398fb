"""Token counts that change: results stay those of eager, and nothing is compiled more often than without a rewrite."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

from samoyeds_compile import Report
from tests.models import families

CLASSES = {entry.id: entry for entry in families.decorated_experts_classes()}
SURFACES = [("mixtral", "grouped_mm"), ("mixtral", "batched_mm"), ("gpt_oss", "grouped_mm")]
LENGTHS = (16, 24, 40, 1, 7)


def build(name: str, implementation: str) -> nn.Module:
    model = families.build(CLASSES[name])
    model.set_experts_implementation(implementation)
    return model


def tokens(model: nn.Module, batch: int, length: int) -> Tensor:
    return families.inputs(CLASSES["mixtral"], model, batch, length)["input_ids"]


def experts_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(families.moe_blocks(model)[0])


def samoyeds(function: Any, dynamic: bool | None = None) -> tuple[Callable[..., Any], Report]:
    report = Report()
    options = {"base": "aot_eager", "report": report}
    return torch.compile(function, backend="samoyeds", options=options, dynamic=dynamic), report


def counting(function: Any, dynamic: bool | None = None) -> tuple[Callable[..., Any], list[fx.GraphModule]]:
    """The same base compiler without the rewrite, and the graphs it was given."""
    graphs = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return lookup_backend("aot_eager")(gm, example_inputs)

    return torch.compile(function, backend=backend, dynamic=dynamic), graphs


def all_rewritten(report: Report) -> bool:
    return bool(report.blocks) and len(report.rewritten) == len(report.blocks)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "implementation"), SURFACES)
def test_lengths_one_after_another(name: str, implementation: str) -> None:
    model = build(name, implementation)
    plain, graphs = counting(model)
    forward, report = samoyeds(model)
    with torch.no_grad():
        for length in LENGTHS:
            plain(tokens(model, 2, length))
        torch._dynamo.reset()
        for length in LENGTHS:
            ids = tokens(model, 2, length)
            close(forward(ids).logits, model(ids).logits)
    assert all_rewritten(report)
    assert len(report.graphs) == len(graphs)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_dynamic_from_the_start(name: str, implementation: str) -> None:
    """With ``dynamic=True`` the numbers that a module keeps (the limit of gpt_oss) become inputs of the graph too."""
    block = build(name, implementation).model.layers[0].mlp  # with the router: k is a number in there
    plain, graphs = counting(block, dynamic=True)
    forward, report = samoyeds(block, dynamic=True)
    with torch.no_grad():
        for length in LENGTHS:
            plain(torch.randn(2, length, 64))
        torch._dynamo.reset()
        for length in LENGTHS:
            hidden = torch.randn(2, length, 64)
            torch.testing.assert_close(forward(hidden), block(hidden), rtol=1e-4, atol=1e-5)
    assert [b.reason for b in report.blocks if not b.rewritten] == []
    assert all_rewritten(report)
    assert len(report.graphs) == len(graphs)


def test_lengths_in_training() -> None:
    model = build("mixtral", "grouped_mm").train()
    forward, report = samoyeds(model)
    for length in (16, 24, 7):
        ids = tokens(model, 2, length)
        gradients = []
        for function in (model, forward):
            model.zero_grad()
            families.loss_of(function(ids)).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    assert len(report.graphs) == 2 and all_rewritten(report)


def test_mark_dynamic() -> None:
    """A length marked dynamic before the first call is one graph for all lengths; a guard on it would raise."""
    model = build("mixtral", "grouped_mm")
    forward, report = samoyeds(model)
    for length in LENGTHS[:3]:
        ids = tokens(model, 2, length)
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad():
            close(forward(ids).logits, model(ids).logits)
    assert len(report.graphs) == 1 and all_rewritten(report)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("shape", [(1, 1), (0, 16), (2, 0)], ids=["one token", "no sequence", "no length"])
def test_hardly_any_tokens(implementation: str, shape: tuple[int, int]) -> None:
    """Router and experts; attention in front of them does not take an empty batch, not even in eager."""
    block = build("mixtral", implementation).model.layers[0].mlp
    forward, report = samoyeds(block)
    hidden = torch.randn(*shape, 64)
    with torch.no_grad():
        close(forward(hidden), block(hidden))
    assert all_rewritten(report)


def test_one_token_through_the_model() -> None:
    model = build("mixtral", "grouped_mm")
    forward, report = samoyeds(model)
    ids = tokens(model, 1, 1)
    with torch.no_grad():
        close(forward(ids).logits, model(ids).logits)
    assert all_rewritten(report)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("lengths", [(0,), (0, 5, 9), (5, 9, 0, 1)], ids=str)
def test_no_tokens_on_the_experts(implementation: str, lengths: tuple[int, ...]) -> None:
    """The experts module by itself, forward and backward, empty before, after and between others."""
    experts = experts_of(build("mixtral", implementation))
    forward, report = samoyeds(experts)
    for length in lengths:
        results = []
        for function in (experts, forward):
            experts.zero_grad()
            x = torch.randn(length, 64, generator=torch.Generator().manual_seed(length)).requires_grad_()
            ids = torch.arange(2 * length).view(length, 2) % 8
            out = function(x, ids, torch.full((length, 2), 0.5))
            out.sum().backward()
            results.append([out.detach(), x.grad, experts.gate_up_proj.grad, experts.down_proj.grad])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert all_rewritten(report)


def test_biased_router() -> None:
    """Every token of the model goes to experts 3 and 5."""
    model = build("gpt_oss", "grouped_mm")
    for name, parameter in model.named_parameters():
        if name.endswith("router.bias"):
            parameter.data[[3, 5]] += 100
    forward, report = samoyeds(model)
    chosen = []
    hooks = [m.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
             for n, m in model.named_modules() if n in families.moe_blocks(model)]  # fmt: skip
    ids = tokens(model, 2, 16)
    with torch.no_grad():
        expected = model(ids).logits
        for hook in hooks:
            hook.remove()
        close(forward(ids).logits, expected)
    assert {int(i) for c in chosen for i in c.unique()} == {3, 5}
    assert all_rewritten(report)


@pytest.mark.parametrize(("name", "implementation"), [*SURFACES, ("gpt_oss", "batched_mm")])
def test_one_expert_takes_all(name: str, implementation: str) -> None:
    """All slots of all tokens name one expert, so each token names it twice."""
    experts = experts_of(build(name, implementation))
    forward, report = samoyeds(experts)
    x, weights = torch.randn(9, 64), torch.rand(9, 2)
    with torch.no_grad():
        for expert in (3, 0, 7):
            ids = torch.full((9, 2), expert)
            close(forward(x, ids, weights), experts(x, ids, weights))
    assert len(report.graphs) == 1 and all_rewritten(report)
