"""The routers of transformers: as many fused as there are blocks, and everything equal to eager, gradients included."""

import pytest
import torch

from samoyeds_compile import Report
from tests.models import families
from tests.models.test_families import TOLERANCE, relative, run

CLASSES = {entry.id: entry for entry in families.decorated_experts_classes()}
TRAINED = {
    "mixtral": "softmax-topk",
    "qwen3_moe": "softmax-topk",
    "olmoe": "softmax-topk",
    "deepseek_v2": "softmax-topk",
    "ernie4_5_moe": "softmax-topk",
    "granitemoe": "topk-softmax",
    "gpt_oss": "topk-softmax",
    "deepseek_v3": "sigmoid-grouped",
    "glm4_moe": "sigmoid-grouped",
    "dots1": "sigmoid-grouped",
    "minimax_m2": "sigmoid-topk",
}
EVALUATED = {"minimax": "softmax-topk", "aria": "topk-softmax", "cohere2_moe": "topk-softmax",
             "mistral4": "softmax-grouped", "afmoe": "sigmoid-topk", "gemma4": "softmax-topk"}  # fmt: skip
KEPT = {
    "deepseek_v4": {"the expert ids are not the indices of a top-k", "neither before nor after the choice is there a "
                    "softmax or sigmoid"},
    "phimoe": {"the expert ids are not the indices of a top-k"},
}  # fmt: skip


def build(name, train=False, dtype=torch.float32, **gate):
    """A tiny model; ``gate`` sets attributes of its routers."""
    model = families.build(CLASSES[name], dtype=dtype)
    model.set_experts_implementation("grouped_mm")
    for module in model.modules():
        if any(hasattr(module, key) for key in gate):
            for key, value in gate.items():
                setattr(module, key, value)
    return model.train(train), families.inputs(CLASSES[name], model)


def check(model, inputs, train, tolerance=TOLERANCE):
    """The blocks' reports, after comparing logits and gradients with eager."""
    logits, grads = run(model, model, inputs, train)
    report = Report()
    options = {"report": report, "base": "aot_eager", "fuse_routers": True}
    new_logits, new_grads = run(model, torch.compile(model, backend="samoyeds", options=options), inputs, train)
    assert relative(new_logits, logits) < tolerance
    assert new_grads.keys() == grads.keys()
    wrong = {name: relative(new_grads[name], grad) for name, grad in grads.items()}
    assert {name: d for name, d in wrong.items() if d >= tolerance} == {}
    assert [g.problem for g in report.graphs if g.problem] == []
    return report.blocks


@pytest.mark.parametrize("name", [*TRAINED, *EVALUATED])
def test_fused(name):
    train = name in TRAINED
    model, inputs = build(name, train)
    blocks = check(model, inputs, train)
    assert len(blocks) == len(families.moe_blocks(model))
    expected = (TRAINED | EVALUATED)[name]
    assert {(b.router, b.router_fused, b.router_reason) for b in blocks} == {(expected, True, None)}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name):
    blocks = check(*build(name), train=False)
    assert not any(b.router_fused for b in blocks)
    assert {b.router_reason for b in blocks} == KEPT[name]


@pytest.mark.parametrize(
    ("name", "gate", "router"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}, "softmax-topk"),
        ("deepseek_v3", {"norm_topk_prob": False}, "sigmoid-grouped"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "num_group": 2, "topk_group": 1}, "softmax-grouped"),
    ],
    ids=["normalised", "unnormalised", "group limited"],
)
def test_settings_of_the_router(name, gate, router):
    blocks = check(*build(name, True, **gate), train=True)
    assert {(b.router, b.router_fused) for b in blocks} == {(router, True)}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v3"])
def test_half_precision(name):
    """Casts of weights and scores are where they were."""
    blocks = check(*build(name, dtype=torch.bfloat16), train=False, tolerance=4e-2)
    assert {b.router_reason for b in blocks} == {None}


def test_auxiliary_loss():
    """The logits, which the loss reads, are an operand of the op and stay."""
    model, inputs = build("qwen3_moe", train=True)
    arguments = {**inputs, "labels": inputs["input_ids"], "output_router_logits": True}
    report = Report()
    options = {"report": report, "base": "aot_eager", "fuse_routers": True}
    compiled = torch.compile(model, backend="samoyeds", options=options)
    expected, actual = model(**arguments), compiled(**arguments)
    assert expected.aux_loss is not None
    torch.testing.assert_close(actual.aux_loss, expected.aux_loss)
    torch.testing.assert_close(actual.loss, expected.loss)
    assert [b.router_fused for b in report.blocks] == [True, True]
