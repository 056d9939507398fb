"""`moe_experts`: hand-written loops that Dynamo cannot trace, as leaves and as described experts."""

import copy
import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import samoyeds_compile
from samoyeds_compile import IntegrationError, Report, moe_experts

H, INNER, E, K = 8, 12, 4, 2


class Listed(nn.Module):
    """Experts as modules of their own, called in ways that no graph can hold."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(H, INNER), "w3": nn.Linear(H, INNER), "w2": nn.Linear(INNER, H)})
            for _ in range(E)
        )
        self.dropout = nn.Dropout(dropout)

    def expert(self, index, x):
        e = self.experts[index]
        return e["w2"](self.dropout(F.silu(e["w1"](x)) * e["w3"](x)))

    def loop(self, x, ids, weights):
        out = torch.zeros_like(x)
        for index in ids.unique():
            token, k = torch.where(ids == index)
            y = self.expert(int(index), x[token]) * weights[token, k, None]
            out.index_add_(0, token, y.to(x.dtype))
        return out

    def any(self, x, ids, weights):
        out = torch.zeros_like(x)
        for index in range(E):
            mask = ids == index
            if mask.any():
                token, k = torch.where(mask)
                out[token] += self.expert(index, x[token]) * weights[token, k, None]
        return out

    def item(self, x, ids, weights):
        rows = []
        for t in range(x.shape[0]):
            rows.append(sum(self.expert(ids[t, k].item(), x[t]) * weights[t, k] for k in range(ids.shape[1])))
        return torch.stack(rows)


DESCRIBED = dict(
    gate="experts.*.w1.weight", up="experts.*.w3.weight", down="experts.*.w2.weight", activation="silu(gate) * up",
    gate_bias="experts.*.w1.bias", up_bias="experts.*.w3.bias", down_bias="experts.*.w2.bias",
)  # fmt: skip


def listed(style, described=False, **kwargs):
    """A class of experts in one of the styles, decorated, and an instance of it."""
    decorate = moe_experts(**DESCRIBED) if described else moe_experts
    return type("Experts", (Listed,), {"forward": decorate(getattr(Listed, style))})(**kwargs)


class Model(nn.Module):
    """Two layers with a router each."""

    def __init__(self, make, checkpointed=False):
        super().__init__()
        self.routers = nn.ModuleList(nn.Linear(H, E) for _ in range(2))
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)

    def run(self, x):
        for router, layer in zip(self.routers, self.layers, strict=True):
            weights, ids = router(x).softmax(-1).topk(K)
            x = x + layer(x, ids, weights=weights)
        return x


def build(make, **kwargs):
    torch.manual_seed(0)
    return Model(make, **kwargs), torch.randn(7, H, requires_grad=True)


def run(model, forward, x):
    """Output, and the gradients of the input and of every parameter; zeros where eager has none."""
    torch.manual_seed(5)
    out = forward(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)
    return out, [torch.zeros(()) if g is None else g for g in grads]


def compiled(model, base="aot_eager", **kwargs):
    report = Report()
    options = {"base": base, "report": report}
    return torch.compile(model, backend="samoyeds", options=options, fullgraph=True, **kwargs), report


def assert_equal_runs(found, expected, tolerance=2e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs.expand_as(mine), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("described", [False, True], ids=["leaf", "described"])
@pytest.mark.parametrize("style", ["loop", "any", "item"])
def test_one_graph_and_equal(style, described):
    model, x = build(lambda: listed(style, described))
    expected = run(model, model, x)
    forward, report = compiled(model)
    assert_equal_runs(run(model, forward, x), expected)
    assert len(report.graphs) == 1
    family = "integration" if described else "leaf"
    assert [(b.module, b.family, b.rewritten) for b in report.blocks] == [
        (f"layers.{i}", family, described) for i in range(2)
    ]
    assert all(described or "opaque to the compiler" in b.reason for b in report.blocks)
    with torch.no_grad():
        torch.testing.assert_close(forward(x), model(x))


@pytest.mark.inductor
@pytest.mark.parametrize("described", [False, True], ids=["leaf", "described"])
def test_on_inductor(described):
    model, x = build(lambda: listed("loop", described))
    forward, _ = compiled(model, "inductor")
    assert_equal_runs(run(model, forward, x), run(model, model, x))


def test_a_leaf_computes_the_very_same_numbers():
    model, x = build(lambda: listed("loop"))
    forward, _ = compiled(model)
    assert torch.equal(forward(x), model(x))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpoint"])
def test_a_leaf_that_draws_random_numbers(checkpointed):
    """The backward repeats the draws of the forward, so even with dropout the gradients are eager's."""
    model, x = build(lambda: listed("loop", dropout=0.5), checkpointed=checkpointed)
    expected = run(model, model, x)
    forward, report = compiled(model)
    assert_equal_runs(run(model, forward, x), expected)
    assert not torch.equal(forward(x), forward(x))
    assert report.blocks[0].family == "leaf"


def test_without_the_decorator_the_report_names_it():
    class Bare(Listed):
        forward = Listed.loop

    model, x = build(Bare)
    report = samoyeds_compile.explain(model, x)
    assert len(report.graphs) > 1 and not report.rewritten
    assert any(
        "@samoyeds_compile.moe_experts" in remedy and "test_leaf.py" in reason for reason, remedy in report.breaks
    )
    assert all("@samoyeds_compile.moe_experts" in b.reason for b in report.blocks)


def test_a_function_that_is_no_method():
    @moe_experts
    def run_experts(x, ids, weights, stack, scale=1.0):
        out = torch.zeros_like(x)
        for index in ids.unique():
            token, k = torch.where(ids == index)
            out[token] += (x[token] @ stack[index]) * weights[token, k, None] * scale
        return out

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(E, H, H))

        def forward(self, x, ids, weights):
            return run_experts(x, ids, weights, self.stack) + run_experts(x, ids, weights, self.stack, scale=2.0)

    model, x = build(Plain)
    forward, report = compiled(model)
    assert_equal_runs(run(model, forward, x), run(model, model, x), 1e-4)
    assert [b.family for b in report.blocks] == ["leaf"] * 4


class Stacked(nn.Module):
    """Stacks with gate and up interleaved, stored [in, out]."""

    def __init__(self):
        super().__init__()
        self.w13 = nn.Parameter(torch.randn(E, H, 2 * INNER) * 0.3)
        self.w2 = nn.Parameter(torch.randn(E, INNER, H) * 0.3)

    def body(self, x, ids, weights):
        out = torch.zeros_like(x)
        for index in ids.unique():
            token, k = torch.where(ids == index)
            z = x[token] @ self.w13[index]
            y = (torch.relu(z[..., ::2]) * (z[..., 1::2] + 1)) @ self.w2[index]
            out[token] += y * weights[token, k, None]
        return out


def stacked(**description):
    fields = dict(gate_up="w13", down="w2", activation="relu(gate) * (up + 1)", interleaved=True, transposed=True)
    return type("Experts", (Stacked,), {"forward": moe_experts(**fields | description)(Stacked.body)})()


def test_interleaved_and_transposed():
    model, x = build(stacked)
    forward, report = compiled(model)
    assert_equal_runs(run(model, forward, x), run(model, model, x))
    block = report.blocks[0]
    assert (block.experts, block.top_k, block.hidden_size, block.intermediate_size) == (E, K, H, INNER)
    assert (block.gate_up_layout, block.weight_layout) == ("interleaved", "in_out")


@pytest.mark.parametrize("wrong", [dict(activation="silu(gate) * up"), dict(interleaved=False)], ids=str)
def test_a_description_that_does_not_fit_becomes_a_leaf(wrong, caplog):
    model, x = build(lambda: stacked(**wrong))
    forward, report = compiled(model)
    with caplog.at_level(logging.WARNING, "samoyeds_compile"):
        assert_equal_runs(run(model, forward, x), run(model, model, x))
    assert [b.family for b in report.blocks] == ["leaf"] * 2
    assert "does not fit" in caplog.text and "results differ" in caplog.text


def test_active_dropout_is_not_described_away():
    """A mode in which the method does more than its description is tried as well."""
    model, x = build(lambda: listed("loop", described=True, dropout=0.5))
    forward, report = compiled(model)
    assert_equal_runs(run(model, forward, x), run(model, model, x))
    model.eval()
    assert_equal_runs(run(model, forward, x), run(model, model, x))
    assert [b.family for b in report.blocks] == ["leaf"] * 2 + ["integration"] * 2


@pytest.mark.parametrize("described", [False, True], ids=["leaf", "described"])
def test_autocast(described):
    model, x = build(lambda: listed("loop", described))
    forward, _ = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = run(model, model, x), run(model, forward, x)
    assert_equal_runs(found, expected, 5e-2)
    if not described:
        assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[0], model(x))  # autocast did reach the experts


def test_each_instance_runs_itself():
    """Layer by layer: compiled code for one instance is not used for another, and follows changed weights."""
    layers = [listed("loop") for _ in range(3)]
    layers[2] = copy.deepcopy(layers[1])
    x, ids, weights = torch.randn(5, H), torch.randint(E, (5, K)), torch.rand(5, K)
    with torch.no_grad():
        for parameter in layers[2].parameters():
            parameter.neg_()
        for layer in layers:
            expected = layer(x, ids, weights)
            layer.compile(backend="samoyeds", options={"base": "aot_eager"}, fullgraph=True)
            torch.testing.assert_close(layer(x, ids, weights), expected)
        layers[0].experts[0]["w2"].weight.mul_(2)
        for layer in layers:
            torch.testing.assert_close(layer(x, ids, weights), Listed.loop(layer, x, ids, weights))


def test_nothing_keeps_the_module_alive():
    from samoyeds_compile.integrations import leaf

    model, x = build(lambda: listed("loop"))
    run(model, compiled(model)[0], x)
    numbers = list(leaf._BY_NUMBER)
    assert len(numbers) >= 2
    del model
    torch._dynamo.reset()
    gc.collect()
    assert len(leaf._BY_NUMBER) <= len(numbers) - 2


def test_sizes_that_change():
    model, _ = build(lambda: listed("loop"))
    forward, report = compiled(model, dynamic=True)
    for tokens in (7, 12, 3):
        x = torch.randn(tokens, H, requires_grad=True)
        assert_equal_runs(run(model, forward, x), run(model, model, x))
    assert len(report.graphs) == 1


def call(function):
    module = torch.compile(lambda *args: function(*args), backend="samoyeds", options={"base": "aot_eager"})
    x = torch.ones(3, H, requires_grad=True)
    return module(x, torch.zeros(3, K, dtype=torch.int64), torch.ones(3, K))


def test_functions_out_of_one_factory_are_told_apart():
    def make(scale):
        return moe_experts(lambda x, ids, weights: x * scale * ids.unique().numel())

    assert [float(call(make(scale)).detach().mean()) for scale in (1.0, 2.0, 3.0)] == [1.0, 2.0, 3.0]


def test_what_a_leaf_must_not_do():
    outside = nn.Parameter(torch.ones(H))
    leaves = {
        "other": moe_experts(lambda x, ids, weights: x.double()),
        "writes": moe_experts(lambda x, ids, weights: x.detach().add_(ids.unique().sum())),
        "reads": moe_experts(lambda x, ids, weights: x * outside),
    }
    with pytest.raises(IntegrationError, match="return one tensor like the hidden states"):
        call(leaves["other"])
    with pytest.raises(IntegrationError, match="writes to its arguments"):
        call(leaves["writes"])
    with pytest.raises(IntegrationError, match="neither an argument nor a parameter"):
        call(leaves["reads"]).sum().backward()


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        (dict(gate_up="w13", activation="silu(gate) * up"), "needs both down and activation"),
        (dict(down="w2", activation="silu(x)"), "needs the first projection"),
        (dict(gate_up="w13", up="w3", down="w2", activation="silu(gate) * up"), "needs the first projection"),
        (dict(up="w1", down="w2", activation="silu(gate) * up"), r"offer \['x'\]"),
        (dict(up="w1", down="w2", activation="silu(x)", scale=2), "does not know scale"),
    ],
    ids=str,
)
def test_descriptions_that_cannot_be(description, problem):
    with pytest.raises(IntegrationError, match=problem):
        moe_experts(**description)


def test_a_name_that_the_module_does_not_have():
    model, x = build(lambda: stacked(down="w4"))
    with pytest.raises(Exception, match="names 'w4', but Experts has no 'w4'"):
        compiled(model)[0](x)


def test_a_graph_without_its_function_says_so():
    x = torch.ones(2, H)
    with pytest.raises(IntegrationError, match="stands for no function of this process"):
        torch.ops.samoyeds.leaf(x, [], [], 1, None, False)
