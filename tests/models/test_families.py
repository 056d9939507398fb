"""Every Experts class that transformers decorates, under both implementations, in eval and in training.

Families are enumerated from the installed library. Each is compared with eager execution of the *same* implementation:
rewritten blocks == MoE blocks that run, one graph, equal outputs, equal gradients of every parameter.
"""

import itertools

import pytest
import torch

from samoyeds_compile import Report
from tests.coverage_page import LOOPS, cell, mode
from tests.models import families

CLASSES = {entry.id: entry for entry in families.decorated_experts_classes()}
OTHERS = {entry.id: entry for entry in families.undecorated() if entry.id not in LOOPS}
TOLERANCE = 5e-4
"""Relative to the largest entry; fp32, a few layers deep, different summation orders."""


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.abs().max().clamp(min=1e-6)
    return float((actual - expected).abs().max() / scale)


def run(model, forward, inputs, train):
    """Logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    torch.manual_seed(7)  # routers that draw noise in training draw the same
    with torch.set_grad_enabled(train):
        output = forward(**inputs)
        if train:
            families.loss_of(output).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return families.logits_of(output).detach(), grads


def compiled(model, base="aot_eager"):
    report = Report()
    return torch.compile(model, backend="samoyeds", options={"report": report, "base": base}), report


def build(entry, implementation, train, dtype=torch.float32):
    try:
        model = families.build(entry, dtype=dtype)
    except families.CannotBuild as reason:
        pytest.skip(f"{entry.id} cannot be built from a config: {reason}")
    model.set_experts_implementation(implementation)
    return model.train(train), families.inputs(entry, model)


def blocks_that_run(entry, model):
    idle = families.recipe_of(entry).idle
    return [path for path in families.moe_blocks(model) if not any(part in path for part in idle)]


def check(entry, implementation, train, base="aot_eager"):
    model, inputs = build(entry, implementation, train)
    logits, grads = run(model, model, inputs, train)
    forward, report = compiled(model, base)
    new_logits, new_grads = run(model, forward, inputs, train)
    assert [b.reason for b in report.blocks if not b.rewritten] == []
    assert sorted(b.module for b in report.blocks) == sorted(blocks_that_run(entry, model))
    assert len(report.graphs) == 1 or families.recipe_of(entry).graph_breaks
    assert relative(new_logits, logits) < TOLERANCE
    assert new_grads.keys() == grads.keys()
    wrong = {name: relative(new_grads[name], grad) for name, grad in grads.items()}
    assert {name: d for name, d in wrong.items() if d >= TOLERANCE} == {}
    return report


def test_enumeration_is_complete():
    """No family is lost on the way: the library has at least those of transformers 5.15, and all of them build."""
    assert len(CLASSES) >= 50
    unbuildable = []
    for entry in CLASSES.values():
        try:
            families.build(entry)
        except families.CannotBuild as reason:
            unbuildable.append((entry.id, str(reason)))
    assert unbuildable == []


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", CLASSES)
def test_family(name, implementation, train, record_property):
    base = families.recipe_of(CLASSES[name]).train_base if train else "aot_eager"
    report = check(CLASSES[name], implementation, train, base)
    record_property(*cell("decorated", name, f"{implementation}, {mode(train)}", report))


def on_inductor():
    """Biases and clamps (gpt_oss), a norm behind the experts (muse_spark) once each; the rest of the sweep is slow."""
    once = {("gpt_oss", "grouped_mm", True), ("gpt_oss", "batched_mm", False), ("muse_spark", "grouped_mm", True)}
    for case in itertools.product(["mixtral", "gpt_oss", "muse_spark"], ["grouped_mm", "batched_mm"], [False, True]):
        marks = [] if case[0] == "mixtral" or case in once else [pytest.mark.slow]
        yield pytest.param(*case, id=f"{case[0]}-{case[1]}-{mode(case[2])}", marks=marks)


@pytest.mark.inductor
@pytest.mark.parametrize(("name", "implementation", "train"), list(on_inductor()))
def test_family_on_inductor(name, implementation, train):
    check(CLASSES[name], implementation, train, base="inductor")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_mixture(name, train, record_property):
    """Undecorated, and in one graph as they are: llama4 is rewritten; what the others compute is another thing."""
    entry = OTHERS[name]
    model = families.build(entry).train(train)
    inputs = families.inputs(entry, model)
    expected = run(model, model, inputs, train)
    forward, report = compiled(model)
    found = run(model, forward, inputs, train)
    assert len(report.graphs) == 1
    assert [b.module for b in report.rewritten] == (families.moe_blocks(model, entry) if name == "llama4" else [])
    assert relative(found[0], expected[0]) < TOLERANCE
    assert max((relative(found[1][key], grad) for key, grad in expected[1].items()), default=0.0) < TOLERANCE
    record_property(*cell("others", name, mode(train), report))
