"""Translation validation: blocks of any style and size are compared indeed, and a wrong rewrite of any is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import samoyeds_compile.rewrite
from samoyeds_compile import Report
from samoyeds_compile.graph.sizes import Size
from samoyeds_compile.graph.values import Value, ValueGraph, hint, read_values
from samoyeds_compile.match.region import Derived, Linear, MoERegion
from samoyeds_compile.replay import replacement
from samoyeds_compile.replay.cases import Case
from samoyeds_compile.replay.numbers import Dimensions, Numbers
from samoyeds_compile.replay.replay import Outcome, Replay
from samoyeds_compile.replay.search import Assignment, settle
from samoyeds_compile.rewrite import emit_region
from samoyeds_compile.validate import Validator
from tests.blocks import Block

EXPERTS, TOP_K = 4, 2


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> dict[str, Outcome]:
    """What came of each case, filled as they are tried."""
    outcomes: dict[str, Outcome] = {}
    original = Replay.compare

    def record(replay: Replay, case: Case) -> Outcome:
        outcomes[case.name] = original(replay, case)
        return outcomes[case.name]

    monkeypatch.setattr(Replay, "compare", record)
    return outcomes


ALL_CASES = {"every expert hit", "one expert empty", "one token", "tokens in a non-contiguous view"}


def all_compared(outcomes: dict[str, Outcome], names: set[str] = ALL_CASES) -> bool:
    return {name for name, outcome in outcomes.items() if outcome.deviation is not None} == names


# --------------------------------------------------------------------------- sizes that are the same number

SIZES = {
    "T = H": (128, {"hidden": 128, "width": 96}),
    "T = I": (96, {"hidden": 128, "width": 96}),
    "H = I": (12, {"hidden": 128, "width": 128}),
    "2I = H": (12, {"hidden": 192, "width": 96}),
    "T K = H": (64, {"hidden": 128, "width": 96}),
    "T K = 2I = H": (128, {"hidden": 256, "width": 128, "bias": True}),
    "E = H": (12, {"hidden": 96, "width": 72, "experts": 96}),
    "E = H = I = T": (128, {"hidden": 128, "width": 128, "experts": 128}),
    "T = E": (16, {"hidden": 128, "width": 96, "experts": 16}),
    "T = K": (2, {"hidden": 128, "width": 96}),
    "T = 1": (1, {"hidden": 128, "width": 96, "experts": 16}),
    "T = K = 1": (1, {"hidden": 128, "width": 96, "experts": 16, "top_k": 1}),
    "T = E, K = 1": (16, {"hidden": 128, "width": 16, "experts": 16, "top_k": 1}),
    "none": (12, {"hidden": 136, "width": 100}),
}


def wrong_activation(emitter: Any) -> Any:
    original, emitter.region.activation = emitter.region.activation, "gelu(gate) * up"
    try:
        return EMIT(emitter)
    finally:
        emitter.region.activation = original


EMIT = samoyeds_compile.rewrite._Emitter.canonical


def report_of(sizes: str, style: str, train: bool) -> Report:
    tokens, options = SIZES[sizes]
    report = Report()
    block = Block(style, **options)
    forward = torch.compile(block, backend="samoyeds", options={"base": "eager", "report": report})
    with torch.set_grad_enabled(train):
        forward(torch.randn(tokens, options["hidden"]))
    return report


@pytest.mark.parametrize("style", ["grouped", "gathered"])
@pytest.mark.parametrize("sizes", SIZES)
def test_equal_sizes(sizes: str, style: str, compared: dict[str, Outcome]) -> None:
    """Every case is compared, whatever the numbers, and at small sizes."""
    report = report_of(sizes, style, train=True)
    assert [b.reason for b in report.blocks] == [None]
    assert report.blocks[0].deviation is not None
    assert all_compared(compared)


@pytest.mark.parametrize("style", ["grouped", "gathered"])
def test_no_tokens(style: str, compared: dict[str, Outcome]) -> None:
    """A graph for no tokens at all computes nothing else."""
    report = Report()
    torch.compile(Block(style, hidden=128), backend="samoyeds", options={"base": "eager", "report": report})(
        torch.randn(0, 128)
    )
    assert [b.reason for b in report.blocks] == [None] and all_compared(compared, ALL_CASES - {"one token"})


@pytest.mark.parametrize("style", ["grouped", "gathered"])
@pytest.mark.parametrize("sizes", SIZES)
def test_equal_sizes_of_a_wrong_rewrite(sizes: str, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samoyeds_compile.rewrite._Emitter, "canonical", wrong_activation)
    report = report_of(sizes, style, train=False)
    assert report.rewritten == [] and "deviates" in report.blocks[0].reason


# ------------------------------------------------------------------------------------- blocks of other styles

Forward = Callable[..., Tensor]


def loop_one_hot(x: Tensor, ids: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
    """transformers 4: tokens as [B, L, H], separate experts, index_add_ into zeros."""
    batch, length, hidden = x.shape
    x, ids, weights = x.view(-1, hidden), ids.view(-1, TOP_K), weights.view(-1, TOP_K)
    out = torch.zeros((batch * length, hidden), dtype=x.dtype)
    mask = F.one_hot(ids, num_classes=len(experts) // 3).permute(2, 1, 0)
    for e in range(len(experts) // 3):
        k, t = torch.where(mask[e])
        out.index_add_(0, t, ffn(x[None, t].reshape(-1, hidden), *experts[3 * e : 3 * e + 3]) * weights[t, k, None])
    return out.reshape(batch, length, hidden)


def loop_eq(x: Tensor, ids: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
    """mistral-inference: ``out[t] += y``."""
    out = torch.zeros_like(x)
    for e in range(len(experts) // 3):
        t, k = torch.where(ids == e)
        out[t] += weights[t, k, None] * ffn(x[t], *experts[3 * e : 3 * e + 3])
    return out


def split_by_count(x: Tensor, ids: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
    """jetmoe: sizes from ``tolist``."""
    ids_s, order = ids.flatten().sort(stable=True)
    counts = F.one_hot(ids_s, len(experts) // 3).sum(0).tolist()
    rows = x[order // TOP_K].split(counts)
    y = torch.cat([ffn(r, *experts[3 * e : 3 * e + 3]) for e, r in enumerate(rows)])
    y = y * weights.flatten()[order][:, None]
    return torch.zeros(x.size(0), x.size(1)).index_add(0, order // TOP_K, y)


def slot_major(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """All first choices before all second ones: the token of a slot is a remainder by T."""
    ids_s, order = ids.t().flatten().sort(stable=True)
    token = order % x.size(0)
    rows = x[token]
    h = F.silu(bmv(gate[ids_s], rows)) * bmv(up[ids_s], rows)
    out = bmv(down[ids_s], h) * weights.t().flatten()[order][:, None]
    return torch.zeros(x.shape).index_add(0, token, out)


def bmv(matrices: Tensor, rows: Tensor) -> Tensor:
    return (matrices @ rows[..., None])[..., 0]


def gather_einsum(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """gpt-fast: weights gathered for every token and slot."""
    h = F.silu(torch.einsum("ti,taoi->tao", x, gate[ids])) * torch.einsum("ti,taoi->tao", x, up[ids])
    return torch.einsum("tai,ta->ti", torch.einsum("tao,taio->tai", h, down[ids]), weights)


def dense_repeat(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Every expert on every token, most of them times zero."""
    tokens, hidden = x.shape
    scores = torch.zeros(tokens, gate.size(0)).scatter(1, ids, weights)
    rows = x.repeat(gate.size(0), 1).view(gate.size(0), -1, hidden)
    y = (F.silu(rows @ gate.transpose(1, 2)) * (rows @ up.transpose(1, 2))) @ down.transpose(1, 2)
    return (y.view(gate.size(0), tokens, hidden) * scores.t().view(gate.size(0), -1)[..., None]).sum(0)


def batched(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Rows already dispatched."""
    h = F.silu(torch.bmm(x, gate.transpose(1, 2))) * torch.bmm(x, up.transpose(1, 2))
    return torch.bmm(h.view(x.size(0), x.size(1), -1), down.transpose(1, 2))


def ffn(rows: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)


STYLES: dict[str, tuple[Forward, bool]] = {
    "loop over one_hot": (loop_one_hot, True),
    "loop over ==": (loop_eq, True),
    "split by tolist": (split_by_count, True),
    "slot-major": (slot_major, False),
    "gather and einsum": (gather_einsum, False),
    "dense": (dense_repeat, False),
}
"""Function, and whether its experts are separate matrices."""


def capture(function: Forward, *args: Any) -> ValueGraph:
    """The graph of a function; its arguments are the graph's inputs."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm

    settings = {"capture_dynamic_output_shape_ops": True, "capture_scalar_outputs": True}
    with torch._dynamo.config.patch(settings):
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return read_values(found[0])


def tokens_of(function: Forward, tokens: int, hidden: int) -> Tensor:
    return torch.randn(2, tokens // 2, hidden) if function is loop_one_hot else torch.randn(tokens, hidden)


def matrices(experts: int, hidden: int, width: int, separate: bool) -> list[Tensor]:
    """Gate, up and down: stacks, or three matrices of one expert after the other."""
    stacks = [torch.randn(experts, *shape) for shape in ((width, hidden), (width, hidden), (hidden, width))]
    return [m for triple in zip(*stacks, strict=True) for m in triple] if separate else stacks


def region_of(function: Forward, separate: bool, tokens: int, hidden: int, width: int, experts: int) -> MoERegion:
    """What a match should make of the function."""
    x = tokens_of(function, tokens, hidden)
    ids = torch.rand(tokens, experts).topk(TOP_K).indices.view(*x.shape[:-1], TOP_K)
    parameters = matrices(experts, hidden, width, separate)
    graph = capture(function, x, ids, torch.rand(ids.shape), *parameters)
    return build(graph, separate)


def build(graph: ValueGraph, separate: bool) -> MoERegion:
    given = {v.node.name.strip("l_"): v for v in graph.values if v.op == "placeholder" and v.is_tensor}
    output = next(v for v in graph.values if v.op == "output").operands[0]
    names = ("gate", "up", "down")
    count = len(given) // 3 - 1
    triples = [tuple(given[f"experts_{3 * e + i}"] for e in range(count)) if separate else (given[name],)
               for i, name in enumerate(names)]  # fmt: skip
    gate, up, down = (Linear(w, None, False, output, torch.float32) for w in triples)
    x, ids, weights = (flat(given, name) for name in ("x", "ids", "weights"))
    region = MoERegion(
        family="by hand", graph=graph, x=x, expert_ids=ids, expert_weights=weights,
        top_k=TOP_K if "ids" in given else 1, gate=gate, up=up, down=down, activation="silu(gate) * up",
        gate_up_layout="separate", output=output,
    )  # fmt: skip
    region.members = between(region)
    return region


def flat(given: dict[str, Value], name: str) -> Any:
    """[T, *], as the op takes it: a static size where there are batch rows, two choices of a token side by side."""
    if f"{name}_1" in given:
        return Derived(torch.stack, ((given[f"{name}_1"], given[f"{name}_2"]),), (("dim", -1),))
    value = given.get(name)
    if value is None or "ids" not in given or len(value.shape) == 2:
        return value
    return Derived(torch.reshape, (value, (hint(value.shape[0]) * hint(value.shape[1]), hint(value.shape[2]))))


def between(region: MoERegion) -> list[Value]:
    members, stack = set(), [region.output]
    while stack:
        value = stack.pop()
        if value not in members and value not in region.inputs:
            members.add(value)
            stack.extend(o for o in value.operands if o.is_tensor)
    return sorted(members, key=lambda v: v.position)


NUMBERS = {
    "small": (6, 16, 24, EXPERTS),
    "large": (30, 136, 100, EXPERTS),
    "T = H": (128, 128, 96, EXPERTS),
    "T K = H = 2I": (64, 128, 64, EXPERTS),
    "T = E": (8, 128, 96, 8),
    "T = E = H = I": (96, 96, 96, 96),
}
"""T, H, I, E."""


FEW = [(style, numbers) for style in STYLES for numbers in NUMBERS if not (STYLES[style][1] and "E = H" in numbers)]
"""Dynamo takes long for many separate experts."""


@pytest.mark.parametrize(("style", "numbers"), FEW)
def test_style(style: str, numbers: str, compared: dict[str, Outcome]) -> None:
    region = region_of(*STYLES[style], *NUMBERS[numbers])
    verdict = Validator().check(region)
    assert verdict.problem is None and verdict.deviation < 1e-4
    assert all_compared(compared)


@pytest.mark.parametrize("style", STYLES)
def test_style_with_symbolic_tokens(style: str, compared: dict[str, Outcome]) -> None:
    function, separate = STYLES[style]
    x = tokens_of(function, 30, 136)
    ids = torch.rand(30, EXPERTS).topk(TOP_K).indices.view(*x.shape[:-1], TOP_K)
    weights = torch.rand(ids.shape)
    for tensor in (x, ids, weights):
        torch._dynamo.mark_dynamic(tensor, x.dim() - 2)
    graph = capture(function, x, ids, weights, *matrices(EXPERTS, 136, 100, separate))
    region = build(graph, separate)
    assert any(isinstance(size, torch.SymInt) for size in region.output.shape)
    verdict = Validator().check(region)
    assert verdict.problem is None and all_compared(compared)


@pytest.mark.parametrize("style", STYLES)
def test_style_wrongly_rewritten(style: str) -> None:
    region = region_of(*STYLES[style], *NUMBERS["T = H"])
    region.activation = "gelu(gate) * up"
    assert "deviates" in (Validator().check(region).problem or "")


@pytest.mark.parametrize("style", ["loop over one_hot", "loop over ==", "split by tolist"])
def test_experts_in_another_order(style: str) -> None:
    """The last expert's matrices for the first one's: seen at a single expert of many."""
    region = region_of(*STYLES[style], 12, 16, 24, 10)
    down = region.down.weights
    region.down = Linear((down[-1], *down[1:-1], down[0]), None, False, region.output, torch.float32)
    assert "deviates" in (Validator().check(region).problem or "")


def test_experts_of_one_fixed_token_are_all_tried() -> None:
    """A single token cannot hit every expert at once, so the case is repeated."""
    region = region_of(loop_eq, True, 1, 16, 24, 10)
    verdict = Validator().check(region)
    assert verdict.problem is None
    down = region.down.weights
    for wrong in (0, 4, 8):
        swapped = list(down)
        swapped[wrong], swapped[wrong + 1] = swapped[wrong + 1], swapped[wrong]
        region.down = Linear(tuple(swapped), None, False, region.output, torch.float32)
        assert "deviates" in (Validator().check(region).problem or "")


CAPACITIES = {
    "C = 5": (5, 136, 100, 4),
    "C = E": (8, 136, 100, 8),
    "C = H = I": (96, 96, 96, 4),
    "C = 1": (1, 72, 80, 4),
}


@pytest.mark.parametrize("numbers", CAPACITIES)
def test_rows_already_dispatched(numbers: str, compared: dict[str, Outcome]) -> None:
    rows, hidden, width, experts = CAPACITIES[numbers]
    graph = capture(batched, torch.randn(experts, rows, hidden), *matrices(experts, hidden, width, False))
    region = build(graph, False)
    assert Validator().check(region).problem is None
    names = {"five rows an expert", "three rows an expert", "one row an expert", "rows in a non-contiguous view"}
    assert all_compared(compared, names)
    region.activation = "gelu(gate) * up"
    assert "deviates" in (Validator().check(region).problem or "")


# ------------------------------------------------------------------------------------------- parts of a replay


def two_choices(
    x: Tensor,
    ids_1: Tensor,
    ids_2: Tensor,
    weights_1: Tensor,
    weights_2: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    """Top-2 gating with the choices apart: a token's two experts must differ, for each is assigned and not added."""
    scores = torch.zeros(x.size(0), gate.size(0)).scatter(1, ids_1[:, None], weights_1[:, None])
    scores = scores.scatter(1, ids_2[:, None], weights_2[:, None])
    h = F.silu(torch.einsum("th,eih->tei", x, gate)) * torch.einsum("th,eih->tei", x, up)
    return torch.einsum("tei,ehi,te->th", h, down, scores)


@pytest.mark.parametrize("tokens", [30, 128, 1])
def test_choices_apart(tokens: int, compared: dict[str, Outcome]) -> None:
    first, second = torch.rand(tokens, EXPERTS).topk(2).indices.unbind(1)
    weights = torch.rand(2, tokens).unbind(0)
    graph = capture(two_choices, torch.randn(tokens, 128), first, second, *weights, *matrices(EXPERTS, 128, 96, False))
    region = build(graph, False)
    assert isinstance(region.expert_ids, Derived)
    assert Validator().check(region).problem is None and all_compared(compared)


def test_norm_over_a_width_that_shrinks(compared: dict[str, Outcome]) -> None:
    """A carried subgraph has sizes of its own, in the block and in its copy."""
    weight = torch.nn.Parameter(torch.randn(100))

    def activate(z: Tensor) -> Tensor:
        gate, up = z.split(100, dim=-1)
        return F.rms_norm(F.silu(gate) * up, (100,), weight, 1e-6)

    report = Report()
    block = Block(hidden=136, width=100, activate=activate)
    torch.compile(block, backend="samoyeds", options={"base": "eager", "report": report})(torch.randn(100, 136))
    assert [b.reason for b in report.blocks] == [None]
    assert report.blocks[0].activation == "carried subgraph" and all_compared(compared)


def fixed_tokens(x: Tensor, ids: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """12 tokens in 3 rows of 4: sizes that say nothing of a number of tokens."""
    return gather_einsum(x.view(3, 4, -1).reshape(12, -1), ids, weights, gate, up, down)


def test_tokens_that_cannot_be_fewer(compared: dict[str, Outcome]) -> None:
    """Then the block is compared with as many as it has, and a single token is no case."""
    region = region_of(fixed_tokens, False, 12, 136, 100, EXPERTS)
    assert Validator().check(region).problem is None
    assert all_compared(compared, ALL_CASES - {"one token"})


def test_block_that_does_not_run() -> None:
    """What cannot be compared is not rewritten."""
    region = region_of(gather_einsum, False, 12, 136, 100, EXPERTS)

    def fail(*_: Any) -> None:
        raise RuntimeError("planted failure")

    region.members[0].node.op, region.members[0].node.target = "call_function", fail
    verdict = Validator().check(region)
    assert "could not be replayed" in (verdict.problem or "") and "planted failure" in (verdict.problem or "")
    assert verdict.deviation == float("inf")


def test_too_few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Replay.compare

    def only_required(replay: Replay, case: Case) -> Outcome:
        return original(replay, case) if case.required else Outcome(None, "planted")

    monkeypatch.setattr(Replay, "compare", only_required)
    region = region_of(gather_einsum, False, 12, 16, 24, EXPERTS)
    assert "only 2 cases could be compared" in (Validator().check(region).problem or "")


def test_gradient_of_one_separate_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right result, but one expert of four does not learn."""
    region = region_of(loop_eq, True, 12, 16, 24, EXPERTS)
    frozen = region.down.weights[2]

    def detached(region: MoERegion, graph: fx.Graph, node_of: Callable[[Value], fx.Node]) -> fx.Node:
        def node(value: Value) -> fx.Node:
            return graph.call_method("detach", (node_of(value),)) if value is frozen else node_of(value)

        return emit_region(region, graph, node)

    monkeypatch.setattr(replacement, "emit_region", detached)
    assert "deviates" in (Validator().check(region).problem or "")
    with torch.no_grad():
        assert Validator().check(region).problem is None


def layers(x: Tensor, ids: Tensor, weights: Tensor, *experts: Tensor) -> Tensor:
    half = len(experts) // 2
    return loop_eq(loop_eq(x, ids, weights, *experts[:half]), ids, weights, *experts[half:])


def test_layers_share_a_verdict(compared: dict[str, Outcome]) -> None:
    """Two loops with symbols of their own for the rows of each expert are one structure; another activation is not."""
    tokens = torch.randn(6, 16), torch.rand(6, EXPERTS).topk(TOP_K).indices, torch.rand(6, TOP_K)
    graph = capture(layers, *tokens, *matrices(2 * EXPERTS, 16, 24, True))
    both = build(graph, True)
    regions = []
    for half in (0, 1):
        pieces = slice(half * EXPERTS, (half + 1) * EXPERTS)
        linears = [Linear(p.weights[pieces], None, False, both.output, torch.float32) for p in both.projections]
        last = [v for v in graph.values if v.op == "index_put"][(half + 1) * EXPERTS - 1]
        region = build(graph, True)
        region.gate, region.up, region.down = linears
        region.output = last
        regions.append(region)
    regions[1].x = regions[0].output
    for region in regions:
        region.members = between(region)
    validator = Validator()
    first, second = map(validator.check, regions)
    assert first.problem is None and second is first
    regions[1].activation = "gelu(gate) * up"
    assert "deviates" in (validator.check(regions[1]).problem or "")
    regions[1].activation, regions[1].down = regions[0].activation, regions[1].gate
    assert validator.check(regions[1]).problem is not None


def test_likeliest_number_first() -> None:
    """Where T K = H = 64, a size is what its place suggests, and may be the other."""
    region = region_of(gather_einsum, False, 32, 64, 24, EXPERTS)
    numbers = Numbers(region, Dimensions((32,), 64, 24), Dimensions((5,), 48, 16))
    assert numbers.choices(Size(64, "", "tokens")) == (10, 48)
    assert numbers.choices(Size(64, "", "features")) == (48, 10)
    assert numbers.choices(Size(64, "", "features", symbolic=True)) == (10,)
    assert numbers.choices(Size(24, "", "tokens")) == (16,)
    assert numbers.choices(Size(EXPERTS, "", "tokens")) == (EXPERTS,)
    assert numbers.choices(Size(1000, "", "tokens")) == (1000,)
    assert numbers.allows(64, 10) and numbers.allows(64, 48) and not numbers.allows(64, 64)
    assert numbers.allows(1000, 3) and numbers.allows(None, 3)


def test_search_goes_back_to_what_may_be_wrong() -> None:
    """Sizes of later steps are not tried in turn while an earlier step fails."""
    region = region_of(gather_einsum, False, 32, 64, 24, EXPERTS)
    numbers = Numbers(region, Dimensions((32,), 64, 24), Dimensions((5,), 48, 16))
    sizes = {Size(64, str(step), "tokens"): step for step in range(40)}
    tried = []

    def attempt(assignment: Assignment) -> int | None:
        tried.append(assignment)
        wrong = [step for size, step in sizes.items() if assignment[size] != (48 if step in (3, 20) else 10)]
        return min(wrong, default=None)

    found = settle(sizes, numbers, attempt)
    assert found is not None and sorted(found.values()).count(48) == 2
    assert len(tried) == 3
