"""Losses step by step: against eager and Inductor, and the same ones in every run."""

import pytest
import torch

from samoyeds_compile import Report
from tests.training.families import FAMILIES, build, train

STEPS = 200
FP32 = 2e-3
"""Relative difference of two losses of one step: rounding alone grows as training goes on."""


def losses(family, dtype, steps, **compile_arguments):
    model = build(family, dtype)
    if not compile_arguments:
        return train(model, model, steps)
    torch._dynamo.reset()
    return train(model, torch.compile(model, **compile_arguments), steps)


def with_samoyeds(family, dtype, steps, base):
    report = Report()
    found = losses(family, dtype, steps, backend="samoyeds", options={"report": report, "base": base})
    assert len(report.rewritten) == 2
    return found


def test_like_eager_and_the_same_in_every_run():
    """With default options nothing is random, and no sum depends on which thread is first."""
    first, again = (with_samoyeds("qwen3_moe", torch.float32, 12, "aot_eager") for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first, losses("qwen3_moe", torch.float32, 12), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_for_200_steps(family):
    eager = losses(family, torch.float32, STEPS)
    ours = with_samoyeds(family, torch.float32, STEPS, "inductor")
    inductor = losses(family, torch.float32, STEPS, backend="inductor")
    assert eager[-20:].mean() < 0.8 * eager[:5].mean()  # there was something to get wrong
    torch.testing.assert_close(ours, eager, rtol=FP32, atol=0)
    torch.testing.assert_close(ours, inductor, rtol=FP32, atol=0)


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_for_200_steps(family):
    """No further from eager than Inductor is, on average; each is a path of its own once they have parted."""
    eager = losses(family, torch.bfloat16, STEPS)
    ours = with_samoyeds(family, torch.bfloat16, STEPS, "inductor")
    spread = (losses(family, torch.bfloat16, STEPS, backend="inductor") - eager).abs()
    assert (ours - eager).abs().mean() <= 1.5 * spread.mean()
    assert (ours - eager).abs().max() <= 2 * spread.max()


@pytest.mark.slow
@pytest.mark.inductor
def test_the_same_in_every_run_with_inductor():
    runs = [with_samoyeds("olmoe", torch.bfloat16, 20, "inductor") for _ in range(2)]
    assert torch.equal(*runs)
