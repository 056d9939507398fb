"""The zoo checks itself: every style, on every value of its axes, is the mixture that its parameters say it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from tests.styles.parts import Block
from tests.styles.reference import reference
from tests.styles.zoo import FLAT, STYLES, Style


def first(result: Any) -> Tensor:
    """The block's output, without logits and losses."""
    return result[0] if isinstance(result, tuple) else result


def assert_is_the_mixture(style: Style, axes: dict[str, Any], rank: str | None = None, tokens: int = 14) -> None:
    top_k = 1 if axes.get("router") == "argmax" else style.top_k or 2
    block = style.build(16, 24, 4, top_k, **{**style.exact, **axes})
    x = style.input(rank, tokens)
    with torch.no_grad():
        actual = first(block(x))
    expected = reference(block, x)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


VARIANTS = [
    pytest.param(style, {axis: value}, id=f"{style.name}-{axis}={value}")
    for style in STYLES.values()
    for axis, values in style.axes.items()
    for value in values
]


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_style(style: Style) -> None:
    for rank in style.inputs:
        for tokens in (2, 14, 30):
            assert_is_the_mixture(style, {}, rank, tokens)


@pytest.mark.parametrize(("style", "axes"), VARIANTS)
def test_variant(style: Style, axes: dict[str, Any]) -> None:
    assert_is_the_mixture(style, axes)


@pytest.mark.parametrize("style", [s for s in STYLES.values() if FLAT in s.inputs], ids=lambda style: style.name)
def test_one_token_and_one_expert_for_all(style: Style) -> None:
    """A router that always prefers expert 0 leaves other experts without tokens; capacities drop most of them."""
    assert_is_the_mixture(style, {}, FLAT, 1)
    block = style.small(**style.exact)
    with torch.no_grad():
        block.gate.weight.copy_(torch.linspace(1, -1, 4)[:, None].expand(4, 16) * 0.2)
    x = style.input(FLAT).abs()
    with torch.no_grad():
        torch.testing.assert_close(first(block(x)).double(), reference(block, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_parameter_has_a_gradient(style: Style) -> None:
    """What no gradient reaches could be wrong without a test of gradients noticing."""
    block = style.small()
    first(block(style.input(tokens=30))).square().sum().backward()
    unused = {"soft_moe": {"gate.weight"}}.get(style.name, set())
    assert {name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()} == unused


def graphs_of(block: Block, x: Tensor, **settings: Any) -> int:
    """How many graphs Dynamo makes; the compiled block computes the same."""
    graphs: list[fx.GraphModule] = []

    def collect(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        actual = torch.compile(block, backend=collect, **settings)(x)
        torch.testing.assert_close(first(actual), first(block(x)))
    return len(graphs)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_one_graph(style: Style) -> None:
    """One graph under the settings that the table says, with static and symbolic sizes; captured ones need them."""
    block, x = style.small(), style.input()
    with style.capturing():
        assert graphs_of(block, x) == 1
        assert graphs_of(block, x, dynamic=True) == 1
    if style.capture:
        assert graphs_of(block, x, fullgraph=True) == 1
        assert graphs_of(block, x) != 1


@pytest.mark.parametrize("style", [s for s in STYLES.values() if s.exact], ids=lambda style: style.name)
def test_bf16_products(style: Style) -> None:
    """What is float32 only on request computes the same mixture with the precision of bfloat16 otherwise."""
    block, x = style.small(), style.input()
    with torch.no_grad():
        torch.testing.assert_close(first(block(x)).double(), reference(block, x), rtol=5e-2, atol=2e-2)
