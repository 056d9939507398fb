"""Option ``profile_ranges``: the profiler shows each block by its module and kernel, and results stay as they are."""

import pytest
import torch
from torch import nn

from samoyeds_compile import Report
from tests.blocks import Block

UTILITIES = ("test_autograd_registration",)
"""Not those that copy or compare a handle, which is no data; Inductor checks the fakes above."""
BASES = ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]


def compiled(model, base, **options):
    torch._dynamo.reset()
    report = Report()
    return torch.compile(model, backend="samoyeds", options={"base": base, "report": report, **options}), report


def two_blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(width=16)), torch.randn(6, 16)


def profiled(function, x):
    function(x)
    with torch.profiler.profile() as profile:
        result = function(x)
    return result, profile.events()


def ranges_of(report):
    return [f"{block.module or block.source}: {block.kernel}" for graph in report.graphs for block in graph.blocks]


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_blocks_have_ranges(base):
    model, x = two_blocks()
    function, report = compiled(model, base, profile_ranges=True)
    result, events = profiled(function, x)
    torch.testing.assert_close(result, model(x))
    names = ranges_of(report)
    assert len(set(names)) == 2 and all("kernel of dense experts" in name for name in names)
    assert [e.name for e in events if e.name in names] == names
    op = "samoyeds::experts_dense" if base == "eager" else "samoyeds::dense_experts"  # AOTAutograd takes it apart
    parents = [e.cpu_parent.name for e in events if e.name == op]
    assert parents == names, "the kernel of each block runs inside its range"


@torch.no_grad()
def test_graphs_are_as_they_were_without_the_option():
    model, x = two_blocks()
    function, report = compiled(model, "eager")
    result, events = profiled(function, x)
    with_ranges, _ = compiled(model, "eager", profile_ranges=True)
    assert torch.equal(result, with_ranges(x))
    assert not any("range_" in e.name or e.name in ranges_of(report) for e in events)
    assert "ranges" not in [step.name for graph in report.graphs for step in graph.steps]


@pytest.mark.parametrize("base", BASES)
def test_training(base):
    (model, _), x = two_blocks()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    function, report = compiled(model, base, profile_ranges=True)
    result, events = profiled(function, x)
    (name,) = ranges_of(report)
    assert "without a kernel" in name and name in {e.name for e in events}
    result.square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, atol=1e-4, rtol=1e-4)


def test_opcheck():
    x = torch.randn(4, 6, requires_grad=True)
    ops = torch.ops.samoyeds
    handle = ops.range_enter(x, "block")[1]
    torch.library.opcheck(ops.range_enter.default, (x, "block"), test_utils=UTILITIES)
    torch.library.opcheck(ops.range_exit.default, (x, handle), test_utils=UTILITIES)
