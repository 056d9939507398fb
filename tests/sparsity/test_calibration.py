"""Statistics gathered while calibrating, against their definitions with everything dense and in float64."""

import pytest
import torch

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.calibration import collect
from samoyeds_compile.sparsity.experts import find_blocks
from samoyeds_compile.sparsity.sample import Sample
from samoyeds_compile.sparsity.stats import SAMPLED, Wanted
from tests.sparsity.experts_models import STACKED, ListedModel, build


def recorded(model, blocks, inputs):
    """(hidden_states, ids, weights) of every block, in float64."""
    seen = {}

    def hook(module, args, kwargs):
        given = [*args, *kwargs.values()]
        seen[module] = [given[0].double().flatten(0, -2), given[1], given[2].double()]

    handles = [block.module.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def reference(module, x, ids, weights, expert):
    """Inputs of both projections of an expert, and the routing weights of its tokens, [n]."""
    tokens, slots = torch.where(ids == expert)
    x = x[tokens]
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert].double()
    out = x @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[expert].double()
    return x, module._apply_gate(out) if module.has_gate else module.act_fn(out), weights[tokens, slots]


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", STACKED)
def test_stats_of_stacks(name: str, routed: bool) -> None:
    model, inputs = build(name)
    blocks = find_blocks(model)
    halves = [{key: value[part] for key, value in inputs.items()} for part in (slice(0, 1), slice(1, None))]
    stats = collect(model, blocks, halves, Wanted(routed, hessian=True))
    seen = recorded(model, blocks, inputs)
    for block in blocks:
        for expert in range(block.experts):
            *xs, g = reference(block.module, *seen[block.module], expert)
            f = g.square() if routed else torch.ones_like(g)
            for projection, x in zip(block.projections, xs, strict=True):
                found = stats[projection.name]
                sampled = len(found.samples[expert].x)
                assert found.count[expert] == len(x) and sampled == min(len(x), SAMPLED // block.experts)
                for actual, expected in (
                    (found.mass[expert], f.sum()),
                    (found.sums[expert], (f[:, None] * x).sum(0)),
                    (found.squares[expert], (f[:, None] * x**2).sum(0)),
                    (found.hessian[expert], (f[:, None] * x).T @ x),
                ):
                    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
                if len(x):
                    norm = ((f[:, None] * x**2).sum(0) / f.sum()).sqrt()
                    torch.testing.assert_close(found.norm(expert).double(), norm, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_stats_of_lists() -> None:
    model, x = ListedModel(), torch.randn(50, 16)
    blocks = find_blocks(model)
    stats = collect(model, blocks, [x], Wanted(routed=True))
    ids = model.router(x).topk(2).indices
    for e, expert in enumerate(model.experts):
        tokens = x[(ids == e).any(-1)]
        for name, seen in (("gate_proj", tokens), ("up_proj", tokens), ("down_proj", expert.between(tokens))):
            found = stats[f"experts.{e}.{name}.weight"]
            assert found.count.tolist() == [len(tokens)]
            torch.testing.assert_close(found.squares[0], seen.square().sum(0).detach())


def test_model_keeps_its_mode_and_hooks_go() -> None:
    model = ListedModel().train()
    model.layers[0].eval()
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training or torch.is_grad_enabled()))
    collect(model, find_blocks(model), [torch.randn(3, 16), (torch.randn(3, 16),), {"x": torch.randn(3, 16)}], Wanted())
    assert modes == [False] * 3
    assert model.training and model.experts[0].training and not model.layers[0].training
    assert not any(module._forward_pre_hooks for module in model.experts.modules())


def test_calibration_that_cannot_be_used() -> None:
    model = ListedModel()
    with pytest.raises(SparsityError, match="calibration: has a str"):
        collect(model, find_blocks(model), ["text"], Wanted())
    with pytest.raises(SparsityError, match=r"experts\.\d\..*: calibration gives it inputs that are infinite or NaN"):
        collect(model, find_blocks(model), [torch.full((3, 16), float("nan"))], Wanted())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sample_is_uniform_and_bounded() -> None:
    picks = torch.zeros(40)
    for seed in range(400):
        sample = Sample(torch.empty(10, 1), seed)
        for start in range(0, 40, 8):
            x = torch.arange(start, start + 8.0)
            sample.add(x.unsqueeze(1), x)
        assert sample.x.shape == (10, 1) and torch.equal(sample.x[:, 0], sample.weights)
        picks[sample.weights.long()] += 1
    assert len(sample.weights.unique()) == 10
    assert abs(float(picks.mean()) - 100) < 1e-6 and float((picks - 100).abs().max()) < 45  # five standard deviations
