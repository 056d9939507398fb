"""`enable`: families that run their experts as a Python loop compile to one graph and compute what they did."""

import copy
import pickle

import pytest
import torch
from torch import nn

import samoyeds_compile
from samoyeds_compile import IntegrationError, Report
from samoyeds_compile.integrations.families import family_of
from samoyeds_compile.integrations.transformers import disable, enable
from tests.coverage_page import LOOPS, cell, mode
from tests.models import families

ENTRIES = {entry.id: entry for entry in families.undecorated() if entry.id in LOOPS}
DECORATED = {entry.id: entry for entry in families.decorated_experts_classes()}
CHANGED = {"jetmoe": 14}  # in each of two layers: two gates, four projections, one mixture
BLOCKS = 2
TOLERANCE = 2e-5
FOUND = {"jetmoe": ["mlp"]}
"""Loops that are captured and recognised as they are: jetmoe's MLP, one graph for both layers, not its attention."""


def build(entry, train=False, dtype=torch.float32, dropout=0.0):
    model = families.build(entry, dtype=dtype).train(train)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "moe_token_dropout"):
            module.moe_token_dropout = dropout
    inputs = families.inputs(entry, model)
    if entry.id == "switch_transformers":  # without masks the library's own code breaks the graph
        inputs |= {name.replace("input_ids", "attention_mask"): torch.ones_like(x) for name, x in inputs.items()}
    return model, inputs


def run(model, forward, inputs):
    model.zero_grad()
    torch.manual_seed(3)
    output = forward(**inputs)
    families.loss_of(output).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return families.logits_of(output).detach(), grads


def compiled(model, base="aot_eager"):
    report = Report()
    return torch.compile(model, backend="samoyeds", options={"base": base, "report": report}), report


def assert_close(found, expected, tolerance, floor=1e-6):
    """Relative to the largest entry, or to ``floor``: some gradients are zero but for rounding."""
    scale = max(float(expected.abs().max()), floor)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def assert_equal_runs(found, expected, tolerance):
    """Equal logits and gradients; an expert without tokens has a gradient of zeros, or none in eager mode."""
    assert_close(found[0], expected[0], tolerance)
    assert expected[1].keys() <= found[1].keys()
    largest = max(float(grad.abs().max()) for grad in expected[1].values())
    for name, grad in found[1].items():
        assert_close(grad, expected[1].get(name, torch.zeros_like(grad)), tolerance, floor=1e-3 * largest)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LOOPS)
def test_undecorated_family(name, train, record_property):
    model, inputs = build(ENTRIES[name], train)
    expected = run(model, model, inputs)
    with enable(model) as enabled:
        assert (len(enabled.changed), enabled.left) == (CHANGED.get(name, BLOCKS), {})
        again = run(model, model, inputs)
        assert torch.equal(again[0], expected[0])  # outside compiled code nothing changes at all
        forward, report = compiled(model)
        found = run(model, forward, inputs)
    assert len(report.graphs) == 1
    assert [(b.family, b.rewritten, b.became) for b in report.blocks] == [
        ("integration", True, ("samoyeds.moe_experts",))
    ] * BLOCKS
    assert_equal_runs(found, expected, TOLERANCE)
    record_property(*cell("loops", name, f"with enable, {mode(train)}", report))


@pytest.mark.parametrize("name", LOOPS)
def test_block_in_bf16(name):
    """As near to float64 as eager is, forward and backward; a whole model would blow up what rounding differs."""
    model, _ = build(ENTRIES[name], dtype=torch.bfloat16)
    module = next(m for m in model.modules() if (f := family_of(m)) and f.is_experts)
    args = family_of(module).sample(module, torch.Generator().manual_seed(0))
    precise = copy.deepcopy(module).double()
    reference = run_block(precise, precise, [a.double() if a.is_floating_point() else a for a in args])
    eager = run_block(module, module, args)
    with enable(model):
        compiled_block = torch.compile(module, backend="samoyeds", options={"base": "aot_eager"}, fullgraph=True)
        found = run_block(module, compiled_block, args)
    for exact, theirs, ours in zip(reference, eager, found, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = 2 * (theirs - exact).norm() + 1e-2 * exact.norm()
        assert (ours - exact).norm() <= allowed


def run_block(module, forward, args):
    """Output, and the gradients of tokens, routing weights and parameters; zeros where eager has none."""
    args = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in args]
    sources = [a for a in args if a.requires_grad] + list(module.parameters())
    out = forward(*args)
    loss = (out.double() * torch.arange(out.numel()).cos().view(out.shape)).sum()
    grads = torch.autograd.grad(loss, sources, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads, strict=True))]


@pytest.mark.parametrize("name", ["jetmoe", "longcat_flash", "step3p7"])  # dbrx itself fails under autocast
def test_autocast(name):
    model, inputs = build(ENTRIES[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = run(model, model, inputs)
        with enable(model):
            forward, report = compiled(model)
            found = run(model, forward, inputs)
    assert len(report.graphs) == 1 and len(report.rewritten) == BLOCKS
    assert_equal_runs(found, expected, 5e-2)


@pytest.mark.parametrize("name", LOOPS)
def test_disable_restores(name):
    model, inputs = build(ENTRIES[name])
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    names = list(model.state_dict())
    changed = enable(model).changed
    assert list(model.state_dict()) == names
    assert sorted(disable(model)) == sorted(changed)
    after = {path: dict(vars(module)) for path, module in model.named_modules()}
    assert {path: state.keys() for path, state in after.items()} == {p: s.keys() for p, s in before.items()}
    report = samoyeds_compile.explain(model, **inputs)
    assert [b.module for b in report.rewritten] == FOUND.get(name, []) and len(report.graphs) > 1


def test_compiled_code_follows():
    """What is compiled already notices that the model is enabled, and that it no longer is."""
    model, inputs = build(ENTRIES["step3p7"])
    forward, report = compiled(model)
    with torch.no_grad():
        expected = families.logits_of(model(**inputs))
        forward(**inputs)
        assert not report.rewritten
        with enable(model):
            torch.testing.assert_close(families.logits_of(forward(**inputs)), expected)
            assert len(report.rewritten) == BLOCKS
        torch.testing.assert_close(families.logits_of(forward(**inputs)), expected)


@pytest.mark.parametrize("name", ["switch_transformers", "nllb_moe"])
def test_active_dropout(name):
    """Drawn numbers differ from eager's, but on average the block computes the same."""
    (entry,) = [e for e in ENTRIES.values() if e.id == name]
    model, _ = build(entry, train=True, dropout=0.5)
    module = next(m for m in model.modules() if (f := family_of(m)) and f.is_experts)
    args = family_of(module).sample(module, torch.Generator().manual_seed(0))
    with torch.no_grad(), enable(model):
        block = torch.compile(module, backend="samoyeds", options={"base": "aot_eager"}, fullgraph=True)
        draws = torch.stack([block(*args) for _ in range(400)])
        mean = module.eval()(*args)
    if name == "nllb_moe":  # in evaluation the library scales by the probability to keep, on top of what dropout does
        mean = mean / 0.5
    assert not torch.equal(draws[0], draws[1])
    assert_close(draws.mean(0), mean, 0.35)
    correlation = torch.corrcoef(torch.stack([draws.mean(0).flatten(), mean.flatten()]))[0, 1]
    assert correlation > 0.97


def test_switch_in_two_dtypes():
    """In fp16 the library keeps the second projection in fp32."""
    model, inputs = build(ENTRIES["switch_transformers"], dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("wo.weight"):
            parameter.data = parameter.data.float()
    expected = run(model, model, inputs)
    enable(model)
    forward, report = compiled(model)
    assert_equal_runs(run(model, forward, inputs), expected, 8e-2)
    assert [b.became for b in report.rewritten] == [("samoyeds.expert_up",)] * BLOCKS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_enabled_and_their_own(copied):
    model, inputs = build(ENTRIES["dbrx"])
    enable(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = run(other, other, inputs)
    forward, report = compiled(other)
    assert_equal_runs(run(other, forward, inputs), expected, TOLERANCE)
    assert len(report.rewritten) == BLOCKS
    assert len(disable(other)) == BLOCKS and len(disable(model)) == BLOCKS


@pytest.mark.parametrize("name", DECORATED)
def test_every_decorated_family_is_switched(name, record_property):
    """What runs afterwards is what tests/models runs under the name of the implementation."""
    model, _ = build(DECORATED[name])
    model.set_experts_implementation("eager")
    with enable(model) as enabled:
        assert sorted(enabled.changed) == sorted(families.moe_blocks(model)) and enabled.left == {}
        implementation = model.get_experts_implementation()
    assert set(implementation.values() if isinstance(implementation, dict) else [implementation]) == {"grouped_mm"}
    record_property(*cell("decorated", name, "eager, with enable", "as `grouped_mm`"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_vl_moe", "openai_privacy_filter"])
def test_decorated_family(name):
    model, inputs = build(DECORATED[name])
    if name != "openai_privacy_filter":  # which is eager unless told otherwise
        model.set_experts_implementation("eager")
    before = model.get_experts_implementation()
    expected = run(model, model, inputs)
    with enable(model) as enabled:
        assert sorted(enabled.changed) == sorted(families.moe_blocks(model)) and enabled.left == {}
        forward, report = compiled(model)
        assert_equal_runs(run(model, forward, inputs), expected, 5e-4)
        assert len(report.graphs) == 1
        assert sorted(b.module for b in report.rewritten) == sorted(enabled.changed)
    assert model.get_experts_implementation() == before
    assert not any("_samoyeds" in key for module in model.modules() for key in vars(module))


def test_twice_and_nothing_to_do():
    model, _ = build(DECORATED["mixtral"])
    model.set_experts_implementation("eager")
    first = enable(model)
    with enable(model) as second:
        assert second.changed == () and "nothing to do" in str(second)
    assert model.config._experts_implementation == "grouped_mm"  # the inner one undoes only what it did: nothing
    assert "2 module(s)" in str(first)
    assert disable(model) == first.changed and disable(model) == ()
    plain = nn.Linear(4, 4)
    assert "nothing to do" in str(enable(plain)) and disable(plain) == ()
    switched, _ = build(DECORATED["mixtral"])
    switched.set_experts_implementation("batched_mm")
    assert enable(switched).changed == () and switched.config._experts_implementation == "batched_mm"


def test_a_later_choice_of_the_user_stays():
    model, _ = build(DECORATED["mixtral"])
    model.set_experts_implementation("eager")
    with enable(model):
        model.set_experts_implementation("batched_mm")
    assert model.config._experts_implementation == "batched_mm"


def test_no_module_is_an_error():
    with pytest.raises(IntegrationError, match=r"model is a function, not a module; pass the model itself"):
        enable(lambda x: x)


def obstacle(name, spoil):
    model, _ = build(ENTRIES[name])
    spoil(model)
    enabled = enable(model)
    assert len(enabled.changed) + len(enabled.left) == CHANGED.get(name, BLOCKS)
    assert not any("left as it is: " + path not in str(enabled) for path in enabled.left)
    return enabled


def test_what_cannot_be_enabled_says_why():
    def hook(model):
        for module in model.modules():
            if type(module).__name__ in ("DbrxExperts", "JetMoeParallelExperts"):
                module.forward = module.forward

    def odd_activation(model):
        model.layers[0].mlp.experts.act_fn = nn.Softshrink()

    def changed_formula(model):
        model.transformer.blocks[0].ffn.experts.mlp.forward = lambda x, w1, v1, w2: x.matmul(w1.T).matmul(w2)

    assert "replaced already" in next(iter(obstacle("dbrx", hook).left.values()))
    assert "not known here" in obstacle("step3p7", odd_activation).left["layers.0.mlp.experts"]
    wrong = obstacle("dbrx", changed_formula)
    assert "results differ" in wrong.left["transformer.blocks.0.ffn.experts"] and len(wrong.changed) == 1
    assert "meta device" in next(iter(obstacle("dbrx", lambda model: model.to("meta")).left.values()))
    jetmoe = obstacle("jetmoe", hook)  # all or nothing, since the modules pass each other the counts
    assert jetmoe.changed == () and "a module that it works with" in "".join(jetmoe.left.values())


def test_trial_leaves_no_trace():
    model, _ = build(ENTRIES["nllb_moe"], train=True)
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    enable(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", LOOPS)
def test_explain_names_the_remedy(name, record_property):
    model, inputs = build(ENTRIES[name])
    report = samoyeds_compile.explain(model, **inputs)
    remedy = "samoyeds_compile.integrations.transformers.enable(model)"
    if name in FOUND:
        assert [b.module for b in report.rewritten] == FOUND[name]
    else:
        assert [b.rewritten for b in report.blocks] == [False] * BLOCKS
        assert all(remedy in b.reason and b.experts for b in report.blocks)
    file = f"modeling_{name}.py"
    assert any(remedy in text and file in reason for reason, text in report.breaks)
    record_property(*cell("loops", name, "as it is", report))
    enable(model)
    report = samoyeds_compile.explain(model, **inputs)
    assert len(report.rewritten) == len(report.blocks) == BLOCKS and report.breaks == []
