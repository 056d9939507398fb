"""Compiled code reads the weights that its module has now, whichever module that is, and recompiles for none."""

import copy
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
Compile = Callable[[Any], Any]


class Samoyeds:
    """The backend under test: `options` for a compile call, and what it reported."""

    def __init__(self) -> None:
        self.report = Report()

    @property
    def arguments(self) -> dict[str, Any]:
        return {"backend": "samoyeds", "options": {"base": "aot_eager", "report": self.report}}

    @property
    def graphs(self) -> int:
        return len(self.report.graphs)


class Plain:
    """The base compiler alone, which counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    @property
    def arguments(self) -> dict[str, Any]:
        return {"backend": self._compile}

    def _compile(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return lookup_backend("aot_eager")(gm, example_inputs)


def moe_of(name: str, implementation: str, layer: int = 0, seed: int = 0) -> nn.Module:
    """Router and experts of one layer; other layers and seeds have other weights."""
    model = families.build(CLASSES[name], seed=seed)
    model.set_experts_implementation(implementation)
    return model.model.layers[layer].mlp


def hidden_states() -> Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))


def run(block: Any) -> Tensor:
    with torch.no_grad():
        out = block(hidden_states())
    return out[0] if isinstance(out, tuple) else out


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def differ(a: Tensor, b: Tensor) -> None:
    """The change under test shows in the result, so that stale weights would be found out."""
    assert (a - b).abs().max() > 1e-3 * b.abs().max()


def all_rewritten(report: Report) -> bool:
    return bool(report.blocks) and len(report.rewritten) == len(report.blocks)


def multiply_in_place(block: nn.Module) -> None:
    block.experts.down_proj.mul_(2)
    block.experts.gate_up_proj[3].neg_()


def write_through_data(block: nn.Module) -> None:
    block.experts.down_proj.data = block.experts.down_proj.data.flip(0)


def replace_parameters(block: nn.Module) -> None:
    block.experts.down_proj = nn.Parameter(block.experts.down_proj.flip(0))
    block.experts.gate_up_proj = nn.Parameter(block.experts.gate_up_proj * 0.5)


def load_other_weights(block: nn.Module) -> None:
    block.load_state_dict({name: tensor.flip(-1) for name, tensor in block.state_dict().items()})


def assign_other_weights(block: nn.Module) -> None:
    block.load_state_dict({name: tensor.flip(-1) for name, tensor in block.state_dict().items()}, assign=True)


CHANGES = [multiply_in_place, write_through_data, replace_parameters, load_other_weights, assign_other_weights]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("name", "implementation"), SURFACES)
def test_changed_weights(name: str, implementation: str, change: Callable[[nn.Module], None]) -> None:
    """The change takes effect at the next call, and compiles nothing that the base alone would not."""
    counts = []
    for compiler in (Samoyeds(), Plain()):
        block = moe_of(name, implementation)
        forward = torch.compile(block, **compiler.arguments)
        before = run(forward)
        with torch.no_grad():
            change(block)
        after = run(forward)
        close(after, run(block))
        differ(after, before)
        counts.append(compiler.graphs)
        if isinstance(compiler, Samoyeds):
            assert all_rewritten(compiler.report)
    assert counts[0] == counts[1]


def call_layers(compiler: Any, layers: list[nn.Module]) -> list[Tensor]:
    """One compiled function, called with each layer in turn."""
    step = torch.compile(lambda layer, x: layer(x), **compiler.arguments)
    return [run(lambda x, layer=layer: step(layer, x)) for layer in layers]


def compile_layers(compiler: Any, layers: list[nn.Module]) -> list[Tensor]:
    """Regional compilation: each layer compiled in place."""
    for layer in layers:
        layer.compile(**compiler.arguments)
    return [run(layer) for layer in layers]


@pytest.mark.parametrize("style", [call_layers, compile_layers])
@pytest.mark.parametrize(("name", "implementation"), SURFACES)
def test_layers_share_a_graph(name: str, implementation: str, style: Callable[..., list[Tensor]]) -> None:
    """Two layers and a third one of another model run through one graph, each with its own weights."""
    layers = [moe_of(name, implementation, 0), moe_of(name, implementation, 1), moe_of(name, implementation, seed=5)]
    expected = [run(layer) for layer in layers]
    plain = Plain()
    style(plain, copy.deepcopy(layers))
    torch._dynamo.reset()
    compiler = Samoyeds()
    results = style(compiler, layers)
    for result, want in zip(results, expected, strict=True):
        close(result, want)
    differ(results[0], results[1])
    assert all_rewritten(compiler.report)
    assert compiler.graphs == plain.graphs
    if style is compile_layers:
        assert compiler.graphs == 1


def test_shared_graph_in_training() -> None:
    """The gradients go to the weights of the layer that was called."""
    layers = [moe_of("mixtral", "grouped_mm", 0).train(), moe_of("mixtral", "grouped_mm", 1).train()]
    references = copy.deepcopy(layers)
    compiler = Samoyeds()
    for layer in layers:
        layer.compile(**compiler.arguments)
    for layer, reference in zip(layers, references, strict=True):
        layer(hidden_states()).square().sum().backward()
        reference(hidden_states()).square().sum().backward()
    for layer, reference in zip(layers, references, strict=True):
        for (name, actual), expected in zip(layer.named_parameters(), reference.parameters(), strict=True):
            assert expected.grad.abs().max() > 0, name
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-6)
    assert compiler.graphs == 1 and all_rewritten(compiler.report)


def train(model: nn.Module, forward: Any, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> list[float]:
    """Losses of five steps."""
    optimizer = make_optimizer(model.parameters())
    ids = families.inputs(CLASSES["mixtral"], model, 2, 16)["input_ids"]
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = forward(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "make_optimizer",
    [lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=3e-3)],
    ids=["sgd", "adamw"],
)
@pytest.mark.parametrize(("name", "implementation"), SURFACES)
def test_training_loop(name: str, implementation: str, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Five optimizer steps on a whole model go as in eager, in one graph."""
    model = families.build(CLASSES[name]).train()
    model.set_experts_implementation(implementation)
    reference = copy.deepcopy(model)
    compiler = Samoyeds()
    losses = train(model, torch.compile(model, **compiler.arguments), make_optimizer)
    expected = train(reference, reference, make_optimizer)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0] - 0.01
    assert compiler.graphs == 1 and all_rewritten(compiler.report)


@pytest.mark.inductor
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_changed_weights_on_inductor(implementation: str) -> None:
    """Inductor with freezing off bakes nothing in either."""
    block, report = moe_of("mixtral", implementation), Report()
    forward = torch.compile(block, backend="samoyeds", options={"report": report})
    before = run(forward)
    for change in (multiply_in_place, replace_parameters):
        with torch.no_grad():
            change(block)
        close(run(forward), run(block))
    differ(run(forward), before)
    assert len(report.graphs) == 1 and all_rewritten(report)
