"""Which form a block is lowered to: a kernel, or gathered weights where the block had that form and it pays.

Most blocks here are float64, for which there is no kernel.
"""

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from samoyeds_compile.backend import find_blocks, lower_blocks, rewrite_blocks
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.lower.choose import prefers_gathered
from samoyeds_compile.lower.stages import lower_experts
from samoyeds_compile.match.driver import FAMILIES
from samoyeds_compile.report.model import GraphReport
from samoyeds_compile.rewrite import FAMILY
from tests.blocks import Block
from tests.ops.operands import operands


def lowered_ops(style, tokens, grad=False, dynamic=False, dtype=torch.float64):
    found = []

    def backend(gm, example_inputs):
        rewrite_blocks(find_blocks(read_graphs(gm), FAMILIES, GraphReport("")))
        lower_blocks(gm)
        found.extend(str(n.target) for n in gm.graph.nodes if "samoyeds" in str(n.target))
        return gm.forward

    model, x = Block(style, experts=16).to(dtype), torch.randn(tokens, 16, dtype=dtype)
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


@pytest.mark.parametrize("style", ["gathered", "grouped"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_kernel(style, dynamic):
    """One op for the whole block, but only without gradients, and not where few small weights are gathered."""
    small = style == "gathered" and not dynamic
    expected = "samoyeds.experts_gathered.default" if small else "samoyeds.experts_dense.default"
    assert lowered_ops(style, 4, False, dynamic, torch.float32) == [expected]
    assert "samoyeds.expert_up.default" in lowered_ops(style, 4, True, dynamic, torch.float32)


def test_more_tokens_never_turn_the_choice_back():
    """Once sorting pays it goes on paying."""
    with torch.no_grad():
        choices = [
            prefers_gathered("gathered", torch.empty(t, 8), torch.empty(t, 8), 2_000_000, 64) for t in range(1, 500)
        ]
    assert choices[0] and not choices[-1]
    assert choices == sorted(choices, reverse=True)


@torch.no_grad()
def test_a_kernel_beats_large_gathered_weights():
    x = torch.empty(1, 8)
    assert prefers_gathered("gathered", x, x, 200_000, 64, kernel=True)
    assert prefers_gathered("gathered", x, x, 20_000_000, 64)
    assert not prefers_gathered("gathered", x, x, 20_000_000, 64, kernel=True)


def lowered_call(op, args):
    """A graph of one op over ``args``, lowered; whatever tensors they hold are its inputs, lists of them included."""
    graph, inputs = fx.Graph(), []

    def as_input(tensor):
        node = graph.placeholder(f"input_{len(inputs)}")
        node.meta["example_value"] = tensor
        inputs.append(tensor)
        return node

    nodes = torch.utils._pytree.tree_map(lambda a: as_input(a) if torch.is_tensor(a) else a, args)
    node = graph.call_function(op, tuple(nodes))
    node.meta[FAMILY] = "gathered"
    graph.output(node)
    module = fx.GraphModule(torch.nn.Module(), graph)
    lower_experts(module)
    graph.lint()
    module.recompile()
    return module, inputs, [str(n.target) for n in graph.nodes if "samoyeds" in str(n.target)]


STAGES = ["samoyeds.route.default", "samoyeds.expert_up.default", "samoyeds.expert_down.default"]
GATHERED = ["samoyeds.experts_gathered.default"]


@pytest.mark.parametrize(
    ("separate", "weighting", "expected"),
    [
        ("", "output", GATHERED),
        ("", "input", GATHERED),
        ("gate,up,down", "output", STAGES),  # no matrix can be gathered from a list
        ("gate,up,down", "input", STAGES),
        ("down", "input", STAGES),
    ],
)
def test_separate_matrices_and_weightings(separate, weighting, expected):
    args = operands(
        0, 1, 2, 16, 16, 24, "separate", "out_in", True, torch.float64, separate=separate, weighting=weighting
    )
    args = (*args, torch.float64, None)
    with torch.no_grad():
        module, inputs, ops = lowered_call(torch.ops.samoyeds.moe_experts.default, args)
        assert ops == expected
        torch.testing.assert_close(module(*inputs), torch.ops.samoyeds.moe_experts(*args))


def test_batched_experts_are_left_to_their_body():
    args = operands(1, 1, 2, 4, 16, 24, "separate", "out_in", True)[3:12]
    args = (torch.randn(4, 3, 16), *args, torch.float32, None)
    module, inputs, ops = lowered_call(torch.ops.samoyeds.experts_batched.default, args)
    assert ops == ["samoyeds.experts_batched.default"]
    torch.testing.assert_close(module(*inputs), torch.ops.samoyeds.experts_batched(*args))


def test_examples_of_lists():
    """What lowering adds has example values also where operands stand in lists."""
    with FakeTensorMode() as mode:
        args = operands(2, 5, 2, 4, 16, 24, "separate", "out_in", True, separate="gate,up,down", weighting="input")
        args = torch.utils._pytree.tree_map(lambda a: mode.from_tensor(a) if torch.is_tensor(a) else a, args)
    module, *_ = lowered_call(torch.ops.samoyeds.moe_experts.default, (*args, torch.float32, None))
    shapes = {n.name: n.meta["example_value"].shape for n in module.graph.nodes if "expert_" in str(n.target)}
    assert shapes == {"expert_up_default": (10, 24), "expert_down_default": (5, 16)}
