"""Whole blocks, executed by the emulator, against float64: nothing out of bounds, unordered or unfenced on the way."""

from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.cuda.block import Routing, choose, plan_block
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.spec import ALONE, VARIANTS, ProjectionSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from tests.codegen.cuda import emulated
from tests.codegen.cuda.blocks import Case, reference, routing
from tests.codegen.cuda.weights import PATTERNS

TARGETS = ["sm_80", "sm_90a"]
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 3e-4}
"""Relative to the norm: h and y are rounded to 16 bits, where another order of sums may tip a few of them."""


def tokens(count: int, case: Case, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, case.hidden, generator=generator).to(case.dtype)


def some_ids(count: int, top_k: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, experts, (count, top_k), generator=torch.Generator().manual_seed(seed))


def check(
    case: Case, target: str, x, ids, out_dtype=torch.float32, weights_dtype=torch.float32, seed=0, variant="wgmma"
) -> None:
    plan = routing(ids, case.experts, dtype=weights_dtype)
    block = plan_block(x, case.packed(), plan, target, 2, out_dtype, variant=VARIANTS[variant])
    for launch in block.launches:
        emulated.run(launch, seed)
    expected = reference(case, x, ids, plan.weights_TK)
    error = float((block.out_TH.double() - expected).norm()) / (float(expected.norm()) or 1.0)
    limit = TOLERANCE[case.dtype] if out_dtype == torch.float32 else 4e-3
    assert error <= limit, f"relative error {error}"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns(pattern, target) -> None:
    case = Case(pattern, bias=True)
    check(case, target, tokens(7, case), some_ids(7, 2, 3))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [45, 150])
def test_many_tokens(count, target) -> None:
    """Tiles of 32 and 64 (128) tokens, full and not, in several column blocks and more than the stages hold."""
    case = Case(Pattern(1, 2, 64), experts=2, hidden=640, width=64)
    check(case, target, tokens(count, case), some_ids(count, 1, 2))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pattern", [Pattern(1, 2, 64), Pattern(2, 4, 32), Pattern(1, 1, 32)], ids=str)
def test_pairs_of_blocks(pattern, seed) -> None:
    """Each copies half of the weights and sends it to the other one, whose tokens may be few or none."""
    case = Case(pattern, experts=3, hidden=640 if seed == 0 else 384, width=64, bias=True)
    largest = 64 if pattern.n == 2 else 128
    for ids in (some_ids(3 * 2 * largest + 20, 1, 3), torch.zeros(9, 1, dtype=torch.int64)):
        plan = routing(ids, case.experts)
        x = tokens(len(ids), case)
        block = plan_block(x, case.packed(), plan, "sm_90a", 3, torch.float32, 2 * largest, VARIANTS["pairs"])
        assert [launch.spec.cluster for launch in block.launches] == [1, 2, 2, 1]
        assert block.launches[1].grid == (2, 1)
        for launch in block.launches:
            emulated.run(launch, seed)
        expected = reference(case, x, ids, plan.weights_TK)
        assert float((block.out_TH.double() - expected).norm()) <= TOLERANCE[case.dtype] * float(expected.norm())


@pytest.mark.parametrize("variant", ["token_pairs", "register_pairs"])
@pytest.mark.parametrize("pattern", [Pattern(1, 2, 64), Pattern(2, 4, 128), Pattern(1, 1, 32)], ids=str)
def test_pairs_that_share_tokens(pattern, variant) -> None:
    """Each gathers half of the tokens and sends it to the other one, whose rows may be padding only."""
    for seed, (ids, width) in enumerate([(some_ids(150, 1, 3), 320), (torch.zeros(9, 1, dtype=torch.int64), 64)]):
        case = Case(pattern, experts=3, hidden=640, width=width, bias=True)
        plan = routing(ids, case.experts)
        x = tokens(len(ids), case)
        block = plan_block(x, case.packed(), plan, "sm_90a", 5, torch.float32, 64, VARIANTS[variant])
        assert [launch.spec.cluster for launch in block.launches] == [1, 2, 2, 1]
        assert block.launches[1].grid == (4, 1) and block.launches[1].spec.slots == 64
        for launch in block.launches:
            emulated.run(launch, seed)
        expected = reference(case, x, ids, plan.weights_TK)
        assert float((block.out_TH.double() - expected).norm()) <= TOLERANCE[case.dtype] * float(expected.norm())


FROM_REGISTERS = [p for p in PATTERNS if not p.selects or p.vector % 64 == 0]


@pytest.mark.parametrize("pattern", FROM_REGISTERS, ids=str)
def test_weights_from_registers(pattern) -> None:
    """Columns change their order in rows and in weights alike; 800 have whole blocks and one that ends early."""
    for seed, (hidden, count) in enumerate([(160, 7), (800, 40)]):
        case = Case(pattern, bias=True, hidden=hidden, dtype=torch.float16 if seed else torch.bfloat16, seed=seed)
        check(case, "sm_90a", tokens(count, case), some_ids(count, 2, 3), seed=seed, variant="registers")


def test_activations_and_ragged_shapes_from_registers() -> None:
    case = Case(Pattern(2, 4, 128, 4), "up * tanh(gate)", hidden=36, width=20)
    check(case, "sm_90a", tokens(3, case), some_ids(3, 2, 3), case.dtype, torch.bfloat16, variant="registers")
    case = Case(Pattern(1, 2, 64), "square(relu(x))", gated=False, hidden=100, width=50)
    check(case, "sm_90a", tokens(150, case), some_ids(150, 1, 3), variant="registers")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", [1, 2])
def test_any_schedule(target, seed) -> None:
    """Threads and copies in other orders; an expert with no token, one with most, and ids that are no experts."""
    case = Case(Pattern(1, 2, 32), experts=4, hidden=640, width=128)
    ids = torch.tensor([[2, 2], [2, 0], [-1, 2], [2, 9], [3, 2], [2, 2], [0, 2]])
    check(case, target, tokens(7, case), ids, seed=seed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "case",
    [
        Case(Pattern(1, 2, 32), "square(relu(x))", gated=False, bias=True, dtype=torch.float16),
        Case(Pattern(2, 4, 32), "gelu(x)", gated=False, dtype=torch.float16),
        Case(Pattern(1, 1, 64), "(up + 1) * (gate * sigmoid(gate * 1.702))", bias=True, dtype=torch.float16),
        Case(Pattern(1, 2, 128), "clamp(gate, None, 1.0) / (1 + exp(0 - up)) + 1", hidden=100, width=50, bias=True),
        Case(Pattern(2, 4, 128, 4), "up * tanh(gate)", hidden=36, width=20),
    ],
    ids=lambda case: case.activation.replace(" ", ""),
)
def test_activations_and_ragged_shapes(case, target) -> None:
    check(case, target, tokens(3, case), some_ids(3, 2, 3), case.dtype, torch.bfloat16)


def test_infinite_activation_of_padding() -> None:
    """The activation of a padding row may be anything; what the next projection reads of it is zero."""
    case = Case(Pattern(1, 1, 32), "1 / x", gated=False, width=50, hidden=64)
    check(case, "sm_80", tokens(3, case), some_ids(3, 2, 3))


@pytest.mark.parametrize("layout", ["row stride", "transposed", "misaligned"])
def test_rows_anywhere(layout) -> None:
    case = Case(Pattern(1, 2, 32))
    x = tokens(5, case)
    if layout == "row stride":
        x = torch.cat([x, x], dim=1)[:, : case.hidden]
    elif layout == "transposed":
        x = x.T.contiguous().T
    else:
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    check(case, "sm_80", x, some_ids(5, 2, 3))


def test_nobody_is_routed() -> None:
    case = Case(Pattern(1, 2, 32))
    for target in TARGETS:
        check(case, target, tokens(3, case), torch.full((3, 2), -1))


@pytest.mark.parametrize(("count", "top_k"), [(0, 2), (3, 0)])
def test_nothing_to_launch(count, top_k) -> None:
    case = Case(Pattern(1, 2, 32))
    plan = routing(torch.zeros(count, top_k, dtype=torch.int64), 3)
    block = plan_block(tokens(count, case), case.packed(), plan, "sm_80", 2, torch.float32)
    assert block.launches == [] and torch.equal(block.out_TH, torch.zeros(count, case.hidden))


def test_same_bits_in_any_company() -> None:
    """A token's result does not depend on the tokens beside it, but for the tile that is chosen for them."""
    case = Case(Pattern(1, 2, 32))
    x, ids = tokens(6, case), some_ids(6, 2, 3)
    outs = []
    for rows in (slice(0, 6), slice(2, 4)):
        whole = routing(ids, 3).weights_TK
        plan = replace(routing(ids[rows], 3), weights_TK=whole[rows].contiguous())
        block = plan_block(x[rows].contiguous(), case.packed(), plan, "sm_80", 2, torch.float32)
        for launch in block.launches:
            emulated.run(launch)
        outs.append(block.out_TH)
    assert torch.equal(outs[0][2:4], outs[1])


@pytest.mark.parametrize(
    ("target", "pattern", "tokens_per_expert", "tokens", "stages"),
    [
        ("sm_80", (1, 2, 32), 1, 8, 4), ("sm_80", (1, 2, 32), 9, 16, 4), ("sm_80", (1, 2, 32), 1000, 64, 4),
        ("sm_86", (1, 2, 32), 1000, 64, 3), ("sm_90a", (1, 2, 32), 1, 16, 4), ("sm_90a", (1, 2, 32), 1000, 128, 4),
        ("sm_90a", (2, 4, 32), 1000, 64, 4), ("sm_120", (2, 4, 32), 1000, 64, 3),
    ],
)  # fmt: skip
def test_choice_of_tiles(target, pattern, tokens_per_expert, tokens, stages) -> None:
    found = choose("up", target, Pattern(*pattern), "bfloat16", "silu(gate) * up", True, False, tokens_per_expert)
    assert isinstance(found, ProjectionSpec) and (found.tokens, found.stages) == (tokens, stages)
    assert found.variant == ALONE and found.slots == tokens


@pytest.mark.parametrize(
    ("kind", "slots", "tokens"), [("pairs", 256, 128), ("pairs", 20, 16), ("token_pairs", 128, 128)]
)
def test_choice_of_tiles_for_two_blocks(kind, slots, tokens) -> None:
    """Those that share weights divide the slots of an expert."""
    arguments = ("up", "sm_90a", Pattern(1, 2, 64), "bfloat16", "silu(gate) * up", True, False, slots)
    found = choose(*arguments, VARIANTS[kind])
    assert found.tokens == tokens and found.cluster == 2 and found.slots >= slots


def test_refused_dtype() -> None:
    case = Case(Pattern(1, 2, 32))
    with pytest.raises(UnsupportedSpecError, match="float32"):
        plan_block(tokens(2, case).float(), case.packed(), routing(some_ids(2, 1, 3), 3), "sm_80", 2, torch.float32)


def test_shapes_are_enough_to_plan() -> None:
    """No value is read on the way to launches, so CUDA graphs can hold them."""
    case = Case(Pattern(1, 2, 32))
    plan = routing(some_ids(5, 2, 3), 3)
    hidden = Routing(*(t.to("meta") for t in vars(plan).values()))
    launches = plan_block(tokens(5, case).to("meta"), case.packed(), hidden, "sm_80", 2, torch.float32).launches
    seen = plan_block(tokens(5, case), case.packed(), plan, "sm_80", 2, torch.float32).launches
    assert [(a.spec, a.grid) for a in launches] == [(a.spec, a.grid) for a in seen]
