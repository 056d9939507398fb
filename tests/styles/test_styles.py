"""Every style through the backend: outputs, gradients and buffers as in eager mode, and what the graph became."""

from collections.abc import Callable

import pytest
import torch

from samoyeds_compile import Report
from tests.coverage_page import cell, mode
from tests.styles.harness import TOLERANCE, Seen, assert_same, compare, ours, products, run
from tests.styles.zoo import STYLES, Style

SAMPLE = (
    "titan_score_before", "megablocks_histc", "gptfast_gather", "gptoss_reference", "matrix_vector", "hf4_mixtral",
    "deepseek_train", "mistral_inference", "stacked_loop", "sort_split_cat", "dense_einsum", "repeat_bmm", "llama4",
    "loop_weighted", "gshard_top2", "padded_buffer",
)  # fmt: skip
"""Styles that the more expensive tests run."""
MODES = pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])


def tolerance_of(style: Style, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    return TOLERANCE[torch.bfloat16 if style.exact else dtype]


def assert_outcome(style: Style, seen: Seen, blocks: int = 1) -> None:
    """The report says what the table says, and the graphs agree with it."""
    rewritten, before, after = seen.report.rewritten, sum(map(products, seen.before)), sum(map(products, seen.after))
    if style.outcome == "kept":
        assert rewritten == []
        assert seen.after == seen.before
        assert all(block.reason for block in seen.report.blocks)
        assert style.reason is None or style.reason in str([block.reason for block in seen.report.blocks])
        return
    left = [b.reason for b in seen.report.blocks if not b.rewritten]
    assert all(left) if style.outcome == "batched" else not left  # why dispatch and combine stayed may be told
    assert len(rewritten) == blocks
    became = {op.replace(".", "::") for block in rewritten for op in block.became}
    assert ("samoyeds::experts_batched" in became) == (style.outcome == "batched")
    assert became and all(op.startswith("samoyeds::") for op in became)
    assert sum(map(ours, seen.before)) == 0 < sum(map(ours, seen.after))
    assert after <= style.outside * len(seen.after) < before


@MODES
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_style(style: Style, train: bool, record_property: Callable[[str, object], None]) -> None:
    """On the first of its input ranks."""
    with style.capturing():
        seen = compare(style.small().train(train), style.input(), train, tolerance=tolerance_of(style), **style.options)
    assert len(seen.before) == 1
    assert_outcome(style, seen)
    record_property(*cell(style.pattern, style.name, mode(train), seen.report))


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_by_name(style: Style) -> None:
    """What a user writes, without any setting: ``backend="samoyeds"``."""
    block, x, report = style.small(), style.input(), Report()
    expected = run(block, block, x, train=False)
    forward = torch.compile(block, backend="samoyeds", options={"base": "eager", "report": report, **style.options})
    actual = run(forward, block, x, train=False)
    assert_same({k: v for k, v in actual.items() if k.startswith("output")},
                {k: v for k, v in expected.items() if k.startswith("output")}, tolerance_of(style))  # fmt: skip
    assert len(report.rewritten) == (style.outcome != "kept")


@pytest.mark.parametrize(
    ("style", "axis", "value"),
    [
        pytest.param(style, axis, value, id=f"{style.name}-{axis}={value}")
        for style in STYLES.values()
        for axis, values in style.axes.items()
        for value in values[1:]
        if axis != "router" or style.name in SAMPLE  # routers stay outside the match
    ],
)
def test_variant(style: Style, axis: str, value: object) -> None:
    """Every other value of every axis, one at a time; matcher alone, forward only (validation covers the rest)."""
    top_k = 1 if value == "argmax" else style.top_k or 2
    block = style.build(16, 24, 4, top_k, **{axis: value})
    with style.capturing():
        seen = compare(
            block, style.input(), False, "eager", tolerance=tolerance_of(style), validate=False, **style.options
        )
    assert len(seen.report.rewritten) == (style.outcome != "kept")


@pytest.mark.parametrize("style", [s for s in STYLES.values() if len(s.inputs) > 1], ids=lambda style: style.name)
def test_sequences(style: Style) -> None:
    """[B, S, H] where a style takes both ranks."""
    with style.capturing():
        seen = compare(
            style.small(), style.input("BSH"), tolerance=tolerance_of(style), validate=False, **style.options
        )
    assert_outcome(style, seen)


@pytest.mark.parametrize("name", SAMPLE)
def test_bf16(name: str) -> None:
    style = STYLES[name]
    block, x = style.small().bfloat16(), style.input(dtype=torch.bfloat16)
    with style.capturing():
        assert_outcome(style, compare(block, x, tolerance=TOLERANCE[torch.bfloat16], **style.options))


@pytest.mark.parametrize("name", SAMPLE)
def test_dynamic(name: str) -> None:
    """One graph for several numbers of tokens."""
    style, seen = STYLES[name], Seen()
    block = style.small()
    forward = torch.compile(block, backend=seen.backend(**style.options), dynamic=True)
    with style.capturing():
        for tokens in (14, 6, 22):
            x = style.input(tokens=tokens)
            expected = run(block, block, x, train=True)
            actual = run(forward, block, x, train=True)
            for found in (actual, expected):
                found.pop("buffer tokens_per_expert", None)
            assert_same(actual, expected, tolerance_of(style))
    assert_outcome(style, seen, blocks=len(seen.before))
    assert len(seen.before) == 1 or style.name == "gshard_top2"  # ``one_hot`` makes a number of the capacity


@pytest.mark.parametrize("name", SAMPLE)
def test_two_layers(name: str) -> None:
    """Two blocks in one graph, each of its own."""
    style = STYLES[name]

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(style.small() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                result = block(x)
                x = x + (result[0] if isinstance(result, tuple) else result)
            return x

    with style.capturing():
        seen = compare(Layers(), style.input(), base="eager", tolerance=tolerance_of(style), **style.options)
    assert len(seen.report.rewritten) == (0 if style.outcome == "kept" else 2)
