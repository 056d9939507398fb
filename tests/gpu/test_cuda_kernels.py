"""Generated CUDA kernels on a CUDA device: whole blocks against float64, in CUDA graphs, over poisoned memory."""

from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.cuda.block import Block, Experts, Routing, plan_block
from samoyeds_codegen.cuda.launch import prepare, run, target_of
from samoyeds_codegen.cuda.operands import Matrix
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.spec import RouteSpec
from tests.codegen.cuda.blocks import Case, reference, routing
from tests.codegen.cuda.weights import PATTERNS

AVAILABLE = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if AVAILABLE else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE, reason="needs a CUDA device"),
    pytest.mark.skipif(AVAILABLE and CAPABILITY < (8, 0), reason="needs sparse tensor cores, sm_80"),
]
WGMMA = [
    pytest.param(False, id="mma"),
    pytest.param(True, id="wgmma", marks=pytest.mark.skipif(CAPABILITY != (9, 0), reason="needs sm_90a")),
]
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


def on_cuda(experts: Experts) -> Experts:
    def moved(matrix: Matrix | None) -> Matrix | None:
        if matrix is None:
            return None
        tensors = {name: t.cuda() for name, t in vars(matrix).items() if isinstance(t, torch.Tensor)}
        return replace(matrix, **tensors)

    both = [replace(p, matrix=moved(p.matrix), up=moved(p.up)) for p in (experts.up, experts.down)]
    return replace(experts, up=both[0], down=both[1])


def planned(case: Case, x: torch.Tensor, ids: torch.Tensor, wgmma: bool) -> tuple[Block, torch.Tensor]:
    """The block's launches, everything they write poisoned, and the routing weights."""
    plan = routing(ids.cuda(), case.experts)
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    block = plan_block(x.cuda(), on_cuda(case.packed()), plan, target_of(CAPABILITY, wgmma), processors, torch.float32)
    poison(block)
    return block, plan.weights_TK.cpu()


def poison(block: Block) -> None:
    for launch in block.launches:
        for name in ("out", "order", "places", "offsets", "tiles", "tile_count"):
            written = launch.arguments.get(name) if name == "out" or isinstance(launch.spec, RouteSpec) else None
            if isinstance(written, torch.Tensor):
                written.view(torch.uint8).fill_(255)  # NaN, or -1


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert bool(found.isfinite().all())
    return float((found.double().cpu() - expected).norm() / expected.norm())


def problem(case: Case, count: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, case.hidden, generator=generator).to(case.dtype)
    return x, torch.randint(-1, case.experts, (count, top_k), generator=generator)


@pytest.mark.parametrize("wgmma", WGMMA)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_against_float64(pattern, dtype, wgmma) -> None:
    case = Case(pattern, bias=True, dtype=dtype, experts=5, hidden=640, width=384)
    for count in (1, 7, 40, 200, 700):
        x, ids = problem(case, count, 2, seed=count)
        block, weights = planned(case, x, ids, wgmma)
        run(block.launches, x.cuda().device)
        assert error(block.out_TH, reference(case, x, ids, weights)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("wgmma", WGMMA)
@pytest.mark.parametrize(
    "case",
    [
        Case(Pattern(1, 2, 32), "square(relu(x))", gated=False, dtype=torch.float16, hidden=100, width=50),
        Case(Pattern(2, 4, 32), "gelu(gate, 'tanh') * up", hidden=36, width=20),
        Case(Pattern(1, 1, 64), "(up + 1) * (gate * sigmoid(gate * 1.702))", bias=True, hidden=2880, width=130),
    ],
    ids=lambda case: case.activation.replace(" ", ""),
)
def test_ragged_shapes(case, wgmma) -> None:
    x, ids = problem(case, 33, 2)
    block, weights = planned(case, x, ids, wgmma)
    run(block.launches, x.cuda().device)
    assert error(block.out_TH, reference(case, x, ids, weights)) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("wgmma", WGMMA)
def test_cuda_graph_with_other_tokens(wgmma) -> None:
    """A graph captured for one routing computes another: the list of tiles is made on the device."""
    case = Case(Pattern(1, 2, 32), experts=8, hidden=512, width=256)
    x, ids = problem(case, 48, 2)
    device_x, device_ids, device = x.cuda(), ids.cuda(), torch.device("cuda")
    target = target_of(CAPABILITY, wgmma)
    experts, processors = on_cuda(case.packed()), torch.cuda.get_device_properties(device).multi_processor_count

    def step() -> Block:
        return plan_block(device_x, experts, Routing(device_ids, weights), target, processors, torch.float32)

    weights = routing(device_ids, case.experts).weights_TK
    for launch in step().launches:
        prepare(launch.spec, device)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(step().launches, device)  # whatever is made once is made before the capture
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        block = step()
        run(block.launches, device)
    for seed in (1, 2):
        new_x, new_ids = problem(case, 48, 2, seed)
        device_x.copy_(new_x)
        device_ids.copy_(new_ids)
        poison(block)
        graph.replay()
        expected = reference(case, new_x, new_ids, weights.cpu())
        assert error(block.out_TH, expected) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("wgmma", WGMMA)
def test_same_bits_every_time(wgmma) -> None:
    case = Case(Pattern(1, 2, 128), experts=4, hidden=1024, width=512)
    x, ids = problem(case, 300, 2)
    outs = []
    for _ in range(3):
        block, _ = planned(case, x, ids, wgmma)
        run(block.launches, torch.device("cuda"))
        outs.append(block.out_TH.clone())
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_launches_do_not_synchronise() -> None:
    case = Case(Pattern(1, 2, 32))
    x, ids = problem(case, 9, 2)
    block, _ = planned(case, x, ids, wgmma=False)
    run(block.launches, torch.device("cuda"))
    plan, device_x, experts = routing(ids.cuda(), case.experts), x.cuda(), on_cuda(case.packed())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = plan_block(device_x, experts, plan, target_of(CAPABILITY), 1, torch.float32)
        run(again.launches, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(again.out_TH, block.out_TH)
