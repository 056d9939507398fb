"""The kernels of `samoyeds_codegen.cuda`, their text executed by the emulator, against float64."""

import ctypes
import re

import pytest
import torch
from torch import Tensor

from samoyeds_codegen import emulate, expr
from samoyeds_codegen.cuda.arguments import arguments_of
from samoyeds_codegen.cuda.block import Experts, Routing, plan_block, plan_routing
from samoyeds_codegen.cuda.emit import ENTRY, emit
from samoyeds_codegen.cuda.launch import Launch
from samoyeds_codegen.cuda.operands import Projection
from samoyeds_codegen.cuda.spec import VARIANTS, Pattern, RouteSpec
from samoyeds_compile.ops.route import route
from tests.codegen.cuda.weights import matrix, random_weight

MMA, WGMMA = "sm_80", "sm_90a"
EXPERTS, HIDDEN, WIDTH, TOKENS, TOP_K = 3, 264, 72, 20, 2
ERROR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Of one rounding; what a kernel stores is rounded once."""


class Weights:
    """Random experts: dense in float64, and as kernels take them."""

    def __init__(self, pattern: Pattern, dtype: torch.dtype, activation: str, bias: bool) -> None:
        self.gated = "gate" in activation
        shapes = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)} | ({"gate": (WIDTH, HIDDEN)} if self.gated else {})
        made = {n: random_weight(pattern, EXPERTS, *s, dtype, seed) for seed, (n, s) in enumerate(shapes.items())}
        self.dense = {name: dense.double() for name, (dense, _) in made.items()}
        self.bias = {name: torch.randn(EXPERTS, s[0]).to(dtype) for name, s in shapes.items()} if bias else {}
        packed = {name: matrix(weight, self.bias.get(name)) for name, (_, weight) in made.items()}
        first = (packed["gate"], packed["up"]) if self.gated else (packed["up"], None)
        up, down = Projection(WIDTH, HIDDEN, *first), Projection(HIDDEN, WIDTH, packed["down"])
        self.experts = Experts(pattern, activation, self.gated, up, down)

    def project(self, name: str, expert: int, rows: Tensor) -> Tensor:
        bias = self.bias[name][expert].double() if self.bias else 0.0
        return rows.double() @ self.dense[name][expert].T + bias

    def up(self, expert: int, rows: Tensor) -> Tensor:
        if not self.gated:
            return expr.evaluate(self.experts.activation, {"x": self.project("up", expert, rows)})
        inputs = {name: self.project(name, expert, rows) for name in ("gate", "up")}
        return expr.evaluate(self.experts.activation, inputs)


def run(launch: Launch, seed: int = 0, text: str | None = None) -> None:
    """What a launch writes may not be read before; everything else is checked by the emulator anyway."""
    writes = (
        ("out", "order", "places", "offsets", "tiles", "tile_count") if isinstance(launch.spec, RouteSpec) else ("out",)
    )
    arguments = []
    for kind, name, _ in arguments_of(launch.spec).fields:
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            arguments.append(emulate.Output(value) if name in writes else value)
        else:
            arguments.append(ctypes.c_int64(value) if kind == "int64_t" else value)
    spec = launch.spec
    text, entry = text or emit(spec), f"samoyeds::{ENTRY}"
    shape = (launch.grid, (spec.threads,), spec.shared_bytes)
    emulate.run(text, entry, *shape, arguments, cluster=spec.cluster, seed=seed)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for one rounding to the dtype, and sums in float32 in another order."""
    if expected.numel():
        error = (found.double() - expected).abs()
        assert (error <= ERROR.get(found.dtype, 0) * expected.abs() + 1e-5 * expected.abs().max()).all(), error.max()


def check_block(
    pattern: Pattern,
    target: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    activation: str = "silu(gate) * up",
    bias: bool = False,
    ids: Tensor | None = None,
    seed: int = 0,
    processors: int = 2,
) -> None:
    """Run tiles, up, down and combine, and compare what each of them leaves, given what the one before it left."""
    weights = Weights(pattern, dtype, activation, bias)
    generator = torch.Generator().manual_seed(seed)
    if ids is None:
        ids = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices
    x = torch.randn(len(ids), HIDDEN, generator=generator).to(dtype)
    plan = route(ids, EXPERTS)
    routing = Routing(ids, torch.rand(ids.shape, generator=generator))
    block = plan_block(x, weights.experts, routing, target, processors, torch.float32)
    for launch in block.launches:
        run(launch, seed)
    _, up, down, _ = (launch.arguments for launch in block.launches)
    h, y = up["out"], down["out"]
    first = 0
    for expert, last in enumerate(plan.offsets_E.tolist()):
        rows = x[plan.order_S[first:last] // ids.shape[1]]
        close(h[first:last, :WIDTH], weights.up(expert, rows))
        close(y[first:last, :HIDDEN], weights.project("down", expert, h[first:last, :WIDTH]))
        first = last
    owned = plan.slot_TK < plan.offsets_E[-1]
    gathered = torch.where(owned[..., None], y[plan.slot_TK.clamp(max=max(first - 1, 0)), :HIDDEN].double(), 0.0)
    expected = (gathered * routing.weights_TK[..., None].double()).sum(1)
    close(block.out_TH, expected)


PATTERNS = [Pattern(1, 1, 32), Pattern(1, 2, 128), Pattern(1, 2, 32), Pattern(2, 4, 64)]


@pytest.mark.parametrize("target", [MMA, WGMMA])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_block(pattern: Pattern, target: str) -> None:
    check_block(pattern, target)


@pytest.mark.parametrize("target", [MMA, WGMMA])
def test_plain_experts_with_biases_in_float16(target: str) -> None:
    check_block(Pattern(1, 2, 64), target, dtype=torch.float16, activation="relu(x)", bias=True)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("target", [MMA, WGMMA])
def test_other_schedules(target: str, seed: int) -> None:
    check_block(Pattern(1, 2, 128), target, seed=seed)


ROUTINGS = {
    "one token": torch.tensor([[2, 0]]),
    "all on one expert": torch.ones(40, 1, dtype=torch.int64),
    "experts of other ranks": torch.tensor([[0, EXPERTS], [EXPERTS, EXPERTS], [1, 1]]),
}


@pytest.mark.parametrize("target", [MMA, WGMMA])
@pytest.mark.parametrize("name", ROUTINGS)
def test_routing(name: str, target: str) -> None:
    check_block(Pattern(1, 2, 128), target, ids=ROUTINGS[name], processors=1)


def up_launches(target: str, variant: str) -> list[Launch]:
    """Tiles and the up projection, with more column blocks in all than there are stages."""
    weights = Weights(Pattern(1, 2, 128), torch.bfloat16, "silu(gate) * up", False)
    ids = torch.arange(TOKENS * TOP_K).view(TOKENS, TOP_K) % EXPERTS
    routing = Routing(ids, torch.rand(TOKENS, TOP_K))
    x = torch.randn(TOKENS, HIDDEN).bfloat16()
    return plan_block(x, weights.experts, routing, target, 1, torch.float32, variant=VARIANTS[variant]).launches[:2]


SYNCHRONISATION = re.compile(
    r"(ptx::(cp_async_(wait|commit)|mbarrier_(wait|arrive|expect)|fence_|wgmma_(fence|commit|wait))|__sync)"
    r"[^;]*;"
)


OF_PAIRS = ("ptx::fence_barrier_init", "ptx::mbarrier_expect", "ptx::mbarrier_arrive_cluster")
"""Only clusters call these; `tests/codegen/cuda/test_planted.py` has errors in those."""


@pytest.mark.parametrize(("target", "variant"), [(MMA, "wgmma"), (WGMMA, "wgmma"), (WGMMA, "registers")])
def test_every_wait_and_fence_and_barrier_counts(target: str, variant: str) -> None:
    """Without any single one of them the emulator stops the kernel; with all of them it does not."""
    tiles, up = up_launches(target, variant)
    run(tiles)
    text = emit(up.spec)
    body = text.index("namespace samoyeds {")  # the wrappers of instructions come before
    calls = [call for call in SYNCHRONISATION.finditer(text, body) if not call.group().startswith(OF_PAIRS)]
    assert len(calls) >= (4 if target == MMA else 11)
    for call in calls:
        with pytest.raises(emulate.EmulationError):
            run(up, text=f"{text[: call.start()]};{text[call.end() :]}")
            pytest.fail(f"not missed: {call.group()}")
    run(up)


def check_route(experts: int, slots: int, seed: int = 0, dtype: torch.dtype = torch.int64, top_k: int = 2) -> Launch:
    """Against the op, whose sort is stable; some ids are no experts."""
    ids = torch.randint(-3, experts + 3, (slots // top_k, top_k), generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    launch, plan = plan_routing(RouteSpec(MMA, experts, 16, str(dtype).removeprefix("torch.")), ids)
    run(launch, seed)
    expected = route(ids, experts)
    owned = int(expected.offsets_E[-1])
    assert torch.equal(plan.offsets_E, expected.offsets_E)
    assert torch.equal(plan.order_S[:owned], expected.order_S[:owned])
    assert torch.equal(plan.order_S[plan.slot_TK.flatten()], torch.arange(ids.numel()))
    ends = expected.offsets_E.tolist()
    tiles = [
        [expert, first, min(16, last - first), 0]
        for expert, (start, last) in enumerate(zip([0, *ends], ends, strict=False))
        for first in range(start, last, 16)
    ]
    assert plan.tiles[: int(plan.count)].tolist() == tiles
    return launch


@pytest.mark.parametrize(
    ("experts", "slots", "dtype"),
    [(3, 2, torch.int64), (8, 1200, torch.int32), (600, 2000, torch.int64), (1, 40, torch.int64)],
)
def test_routing_plan(experts: int, slots: int, dtype: torch.dtype) -> None:
    """One slot, several rounds of each warp, more experts than threads."""
    check_route(experts, slots, dtype=dtype)


def test_routing_plan_needs_every_barrier() -> None:
    """In other schedules too it is right; without any single barrier the emulator stops it."""
    launch = check_route(8, 1200, seed=1)
    text = emit(launch.spec)
    for barrier in re.finditer(r"__sync(threads|warp)\(\);", text):
        with pytest.raises(emulate.EmulationError):
            run(launch, text=text[: barrier.start()] + text[barrier.end() :])
            pytest.fail(f"not missed: {text[barrier.start() : barrier.end() + 60]}")
