"""Which form a block is lowered to: gathered weights only where the block had that form and it pays."""

import pytest
import torch

from samoyeds_compile.backend import find_blocks, lower_blocks, rewrite_blocks
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.lower.choose import prefers_gathered
from samoyeds_compile.match.driver import FAMILIES
from samoyeds_compile.report.model import GraphReport
from tests.blocks import Block


def lowered_ops(style, tokens, grad=False, dynamic=False):
    torch._dynamo.reset()
    found = []

    def backend(gm, example_inputs):
        rewrite_blocks(find_blocks(read_graphs(gm), FAMILIES, GraphReport("")))
        lower_blocks(gm)
        found.extend(str(n.target) for n in gm.graph.nodes if "samoyeds" in str(n.target))
        return gm.forward

    model, x = Block(style, experts=16), torch.randn(tokens, 16)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(model, backend=backend, dynamic=dynamic)(x), model(x))
    return found


@pytest.mark.parametrize(
    ("style", "tokens", "grad", "dynamic", "gathered"),
    [
        ("gathered", 1, False, False, True),
        ("grouped", 1, False, False, False),  # it may be faster or slower than what the block did
        ("gathered", 1, True, False, False),
        ("gathered", 8000, False, False, False),
        ("gathered", 4, False, True, False),  # the next call may bring more tokens
    ],
)
def test_form(style, tokens, grad, dynamic, gathered):
    ops = lowered_ops(style, tokens, grad, dynamic)
    assert ("samoyeds.experts_gathered.default" in ops) == gathered
    assert ("samoyeds.expert_up.default" in ops) != gathered


def test_more_tokens_never_turn_the_choice_back():
    """Once sorting pays it goes on paying."""
    with torch.no_grad():
        choices = [
            prefers_gathered("gathered", torch.empty(t, 8), torch.empty(t, 8), 2_000_000, 64) for t in range(1, 500)
        ]
    assert choices[0] and not choices[-1]
    assert choices == sorted(choices, reverse=True)
