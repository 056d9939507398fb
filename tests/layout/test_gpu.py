"""Layouts of blocks on GPUs: the same cut over the declarations of what kernels there read and write; no GPU needed."""

import itertools
import time
from dataclasses import replace

import pytest
import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from samoyeds_codegen.gpu.choose import choose, regime
from samoyeds_codegen.gpu.cost import Block, by_order_seconds, projection_seconds
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern
from samoyeds_compile.layout import propagate
from samoyeds_compile.layout.algebra import Place
from samoyeds_compile.layout.assign import Problem
from samoyeds_compile.layout.cut import FORBIDDEN
from samoyeds_compile.layout.declare import DECLARATIONS, TARGETS
from samoyeds_compile.layout.gpu import GpuBlock, calls, gpu_plan, gpu_regimes
from samoyeds_compile.layout.plan import PLAN
from samoyeds_compile.layout.region import Sizes, experts_region
from samoyeds_compile.lower import gpu as lower_gpu
from samoyeds_compile.report.layout_picture import picture
from tests.layout.test_assign import _cheapest

H200 = Device("H200", (9, 0), 132, 1.98e9, 4.8e12)
A100 = Device("A100", (8, 0), 108, 1.41e9, 2.0e12)
DENSE = ExpertsSpec("bfloat16", None, "silu(gate) * up", True)
SPARSE = replace(DENSE, pattern=Pattern(1, 2, 128))
MIXTRAL = Sizes(1, 4096, 14336, 8, 2, size=2)
QWEN = Sizes(1, 2048, 768, 128, 8, bias=True, size=2)
NARROW = Sizes(1, 64, 2048, 8, 2, size=2)
"""Few features in, many out: the first projection has many short programs, each of which reads the order anew."""
BLOCKS = [
    GpuBlock(spec, sizes, device, kinds)
    for spec, sizes, device in itertools.product((DENSE, SPARSE), (MIXTRAL, QWEN, NARROW), (H200, A100))
    for kinds in ("", "triton", "triton mma wgmma")
]
GATHER = "gather -> expert_up"


@pytest.mark.parametrize("block", BLOCKS[::3] + BLOCKS[1:6], ids=str)
def test_as_cheap_as_trying_everything(block: GpuBlock) -> None:
    """For all numbers of slots: the plan is the cut's, and that is the least of all layouts of all edges."""
    for call in calls(block):
        region = experts_region(block.sizes.at(call.slots // block.sizes.top_k), call.target)
        problem = Problem(region, call.numbers)
        found, (first, last) = problem.solve(), region.together[0]
        every = [
            _cheapest(problem, {2 * first + 1: up, 2 * last + 1: down})
            for up, down in itertools.product(Place, repeat=2)
            if (up is Place.TILES) == (down is Place.TILES)
        ]
        assert found.picoseconds == min(every) < FORBIDDEN
        assert found[GATHER].read is found[GATHER].written is call.reads


@pytest.mark.parametrize("target", TARGETS[1:])
@pytest.mark.parametrize("op", DECLARATIONS)
def test_declarations_are_submodular(op: str, target: str) -> None:
    """`table` refuses others; what is written to slots, and combined from there, holds on every GPU."""
    call = calls(BLOCKS[1])[9]
    Problem(experts_region(MIXTRAL, "triton"), call.numbers)
    problem = Problem(experts_region(MIXTRAL, target), call.numbers)
    problem._op(op)
    edges = problem.solve()
    assert edges["activation -> expert_down"].written is edges["scale -> combine"].written is Place.SLOTS
    assert edges["out"].written is edges["x"].written is Place.TOKENS


@pytest.mark.parametrize("device", [H200, A100], ids=lambda d: d.name)
@pytest.mark.parametrize("spec", [DENSE, SPARSE], ids=str)
@pytest.mark.parametrize("sizes", [MIXTRAL, QWEN], ids=["mixtral", "qwen"])
def test_large_blocks_gather_while_they_load(sizes: Sizes, spec: ExpertsSpec, device: Device) -> None:
    """A pass over all slots costs more than what waits for the order, which other programs hide."""
    made = gpu_plan("b", GpuBlock(spec, sizes, device, "triton"))
    assert made.gathers == 0 and made.report.gathered == ""
    assert (made.report.conversions, made.report.bytes_per_token) == (1, sizes.top_k * sizes.hidden * 4)
    edge = made.report.regimes[-1].edges[1]
    assert edge.edge == GATHER and edge.runner_up == Place.SLOTS.title and edge.margin > 1


def test_narrow_blocks_gather_before_at_prefill() -> None:
    """Decode does not pay for a launch; the sum decides, and says where."""
    block = GpuBlock(SPARSE, NARROW, H200, "triton")
    made = gpu_plan("b", block)
    first = made.gathers & -made.gathers
    assert 2 < first < 2**16 and made.report.gathered == f"{first // 2 + 1}-"
    of = Block(NARROW.experts, NARROW.hidden, NARROW.width)
    for call in calls(block):
        candidate = choose(SPARSE, of, call.slots, H200, "triton")
        follows = by_order_seconds(candidate, SPARSE, of, call.slots, H200)
        copied = projection_seconds(candidate, "up", SPARSE, of, call.slots, H200) + 2e-6
        copied += call.slots * NARROW.hidden * 4 / H200.bandwidth
        assert (copied < follows) == (call.reads is Place.SLOTS) == bool(made.gathers & call.slots)
    assert gpu_plan("b", replace(block, device=replace(H200, bandwidth=1e10))).gathers != made.gathers


def test_kernels_without_a_choice() -> None:
    """CUDA kernels gather while they load; grouped products read slots."""
    cuda = gpu_plan("b", GpuBlock(SPARSE, NARROW, H200, "mma wgmma"))
    products = gpu_plan("b", GpuBlock(DENSE, QWEN, H200, ""))
    assert cuda.gathers == products.gathers == 0
    assert (cuda.report.gathered, products.report.gathered) == ("", "all")
    assert all(edge.runner_up == "" for made in (cuda, products) for r in made.report.regimes for edge in r.edges)
    assert products.report.regimes[0].edges[1].layout == Place.SLOTS.title
    assert "before the first projection" in products.report.summary


def test_choices() -> None:
    """``token_major`` gathers before wherever it can, ``dearest`` does what the sum says not to do."""
    block = GpuBlock(SPARSE, NARROW, H200, "triton")
    plans = {choice: gpu_plan("b", block, choice).gathers for choice in ("cheapest", "token_major", "dearest")}
    assert plans["token_major"] == sum(call.slots for call in calls(block))
    assert plans["cheapest"] + plans["dearest"] == plans["token_major"] and plans["cheapest"] & plans["dearest"] == 0


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_regimes_cover_all_tokens(block: GpuBlock) -> None:
    found = gpu_regimes(block)
    assert 1 <= len(found) <= 3 and found[0].first == 1 and found[-1].last is None
    assert all(a.last + 1 == b.first for a, b in itertools.pairwise(found) if a.last)
    for call in calls(block):
        first, last = call.tokens(block.sizes.top_k)
        assert {regime(t * block.sizes.top_k) for t in (first, last)} == {call.slots}


def test_report() -> None:
    made = gpu_plan("b", GpuBlock(SPARSE, NARROW, H200, "triton"))
    drawn = picture(made.report)
    assert "decode (triton" in drawn and "prefill (triton" in drawn and Place.SLOTS.title in drawn
    assert made.report.summary.startswith("layouts, bfloat16 1:2:128+2:4, triton on H200 (data sheet costs): rows")


def test_planning_takes_no_time() -> None:
    """48 layers that all differ."""
    start = time.perf_counter()
    for layer in range(48):
        gpu_plan("b", GpuBlock(SPARSE, replace(QWEN, width=768 + 128 * layer), H200, "triton mma wgmma"))
    assert time.perf_counter() - start < 5  # a machine that does nothing else takes half a second


@pytest.mark.parametrize("triton", [None, True])
def test_pass_over_fakes_on_a_gpu(triton: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes come from the graph; the number of tokens stays a symbol; no device is asked for anything."""
    monkeypatch.setattr(propagate, "device_of", lambda device: H200)
    monkeypatch.setattr(propagate, "usable", lambda *rest: (["triton"], {}))
    monkeypatch.setattr(lower_gpu, "tune", None)
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True) as mode, torch.no_grad():
        graph = canonical(mode)
        (report,) = propagate.propagate_layouts(graph, "cheapest", triton)
    (node,) = graph.graph.find_nodes(op="call_function", target=torch.ops.samoyeds.moe_experts.default)
    assert node.meta[PLAN].report is report and report.kernel.endswith(
        "triton on H200" if triton else "products on H200"
    )
    assert isinstance(node.args[1].meta["example_value"].shape[0].node.expr, sympy.Symbol)
    assert not shapes.guards and not shapes.replacements and len(report.regimes) <= 3


def canonical(mode: FakeTensorMode) -> fx.GraphModule:
    """A block of dense bfloat16 experts on a CUDA device, whose number of tokens is a symbol."""
    shapes = mode.shape_env
    symbol = shapes.create_symbol(24, source=ConstantSource("tokens"), dynamic_dim=DimDynamic.DYNAMIC)
    tokens = shapes.create_symintnode(symbol, hint=24)
    graph = fx.Graph()
    values = {
        "x": torch.empty(tokens, 64, dtype=torch.bfloat16, device="cuda"),
        "ids": torch.empty(tokens, 2, dtype=torch.int64, device="cuda"),
        "weights": torch.empty(tokens, 2, device="cuda"),
        "up": torch.empty(8, 4096, 64, dtype=torch.bfloat16, device="cuda"),
        "down": torch.empty(8, 64, 2048, dtype=torch.bfloat16, device="cuda"),
    }
    nodes = {}
    for name, value in values.items():
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["example_value"] = value
    x, ids, weights, up, down = nodes.values()
    out = graph.call_function(
        torch.ops.samoyeds.moe_experts.default,
        (x, ids, weights, [], [up], [down], None, None, None, "silu(gate) * up", "concatenated", "out_in", "output",
         torch.bfloat16, None),
    )  # fmt: skip
    graph.output(out)
    return fx.GraphModule(torch.nn.Module(), graph)
