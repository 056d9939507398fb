"""Blocks put together at random: rewritten and equal, or kept and explained; none wrong, none crashing."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.styles.generator import DISPATCHES, Spec, build, specs
from tests.styles.harness import TOLERANCE, compare
from tests.styles.reference import reference

BLOCKS, SLOW_BLOCKS = 520, 5200
"""Over all ways of dispatching; in every run, and in the slow sweep."""
FLOOR: dict[str, float] = dict.fromkeys(DISPATCHES, 0.0)
"""Least share of the blocks that must be rewritten; to be raised to what is measured."""
VALIDATED = 0.1
"""Share of the blocks that are validated as well."""


def deterministic(examples: int) -> Callable[..., Callable[..., None]]:
    """The same blocks in every run; nothing to shrink, as a `Spec` is drawn in one piece."""
    return settings(
        derandomize=True, deadline=None, database=None, max_examples=examples, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_generator(dispatch: str) -> None:
    """What is generated is the mixture that it says it is."""

    @deterministic(60)
    @given(specs(dispatch))
    def is_the_mixture(spec: Spec) -> None:
        block, x = build(spec)
        with torch.no_grad():
            actual, expected = block(x), reference(block, x)
        rtol, atol = TOLERANCE[spec.dtype]
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol * scale)

    is_the_mixture()


def run_blocks(dispatch: str, examples: int) -> tuple[int, int]:
    """Compile blocks and compare them with eager; how many were rewritten, of how many."""
    counted: list[bool] = []

    @deterministic(examples)
    @given(specs(dispatch))
    def check(spec: Spec) -> None:
        counted.append(is_rewritten(spec))

    check()
    return sum(counted), len(counted)


def is_rewritten(spec: Spec) -> bool:
    """Whether; the result is right, and what is not rewritten has a reason."""
    torch._dynamo.reset()
    block, x = build(spec)
    validate = random.Random(repr(spec)).random() < VALIDATED
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        seen = compare(block, x, base="eager", tolerance=TOLERANCE[spec.dtype], validate=validate)
    for found in seen.report.blocks:
        assert found.rewritten or found.reason
        assert "internal error" not in (found.reason or "")
    return bool(seen.report.rewritten)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_generated_blocks(dispatch: str, record_property: Callable[[str, object], None]) -> None:
    rewritten, blocks = run_blocks(dispatch, BLOCKS // len(DISPATCHES))
    record_property("generated", (dispatch, rewritten, blocks))
    assert rewritten / blocks >= FLOOR[dispatch]


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_many_generated_blocks(dispatch: str, record_property: Callable[[str, object], None]) -> None:
    rewritten, blocks = run_blocks(dispatch, SLOW_BLOCKS // len(DISPATCHES))
    record_property("generated", (dispatch, rewritten, blocks))
    assert rewritten / blocks >= FLOOR[dispatch]
