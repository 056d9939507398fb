"""Kernels in Triton's interpreter against float64. Run by test_interpreter.py, with TRITON_INTERPRET=1."""

import pytest
import torch

from samoyeds_codegen.triton.kernel import Projection, combine, most_tiles, work_list
from samoyeds_codegen.triton.operands import DenseSide, PackedSide
from samoyeds_codegen.triton.select import candidates
from samoyeds_codegen.triton.spec import KernelSpec, Pattern
from samoyeds_compile.ops.route import route
from tests.codegen.triton.cases import MLP, TILE, Experts, check, prune, run, spec_of

PATTERNS = [
    None, Pattern(1, 1, 32), Pattern(1, 2, 32), Pattern(1, 2, 16), Pattern(1, 2, 128), Pattern(2, 4, 64),
    Pattern(1, 2, 32, 16), Pattern(2, 4, 32, 3),
]  # fmt: skip
HALF = [(dtype, pattern) for dtype in ("float16", "bfloat16") for pattern in (*PATTERNS[:3], PATTERNS[5])]


@pytest.mark.parametrize(("dtype", "pattern"), [*(("float32", pattern) for pattern in PATTERNS), *HALF], ids=str)
def test_block(dtype, pattern):
    """No size is a multiple of anything; ids beyond both ends."""
    check(Experts(spec_of(dtype, pattern), experts=4, hidden=75, width=42, bias=True))


@pytest.mark.parametrize("pattern", PATTERNS[:6], ids=str)
def test_plain_experts_without_bias(pattern):
    check(Experts(spec_of("float32", pattern, MLP), experts=3, hidden=33, width=70))


@pytest.mark.parametrize("pattern", [None, Pattern(1, 1, 16), Pattern(1, 2, 32), Pattern(2, 4, 32)], ids=str)
def test_tiles_of_the_table(pattern):
    """Those that are chosen on a device, at sizes that fill more than one of them."""
    case = Experts(spec_of("bfloat16", pattern), experts=2, hidden=160, width=136)
    for tiles in candidates(case.spec):
        check(case, tokens=40, top_k=1, up_tile=tiles.up, down_tile=tiles.down)


@pytest.mark.parametrize(
    "ids",
    [
        torch.empty(0, 2, dtype=torch.int64),
        torch.full((3, 2), -1),
        torch.full((5, 2), 4),
        torch.zeros(19, 1, dtype=torch.int32),
        torch.tensor([[3, 3], [0, 3], [3, 0]]),
        torch.tensor([[-(2**62), 2**62, 1]]),
    ],
    ids=["no tokens", "nobody", "beyond", "one expert", "named twice", "far beyond"],
)
@pytest.mark.parametrize("pattern", [None, Pattern(1, 2, 32)], ids=str)
def test_ragged(ids, pattern):
    check(Experts(spec_of("float32", pattern), experts=4, hidden=32, width=32), ids=ids)


def test_many_experts():
    check(Experts(spec_of(), experts=300, hidden=16, width=16), tokens=9, top_k=3)


def test_any_stride_of_rows():
    case = Experts(spec_of("float32", Pattern(1, 2, 32)), experts=4, hidden=48, width=32)
    wide = torch.full((14, 64), float("nan"))
    wide[::2, :48] = case.randn(7, 48)
    check(case, x=wide[::2, :48], ids=torch.randint(4, (7, 2)))


def join_rows(gate, up):
    return torch.cat([gate, up], 1)


def interleave(gate, up):
    return torch.stack([gate, up], 2).flatten(1, 2)


@pytest.mark.parametrize("layout", ["concatenated", "interleaved", "transposed", "transposed interleaved"])
def test_dense_layouts(layout):
    """Gate and up of one parameter, and [E, in, out], are strides."""
    case = Experts(spec_of(), experts=3, hidden=40, width=24, bias=True)
    join = interleave if "interleaved" in layout else join_rows
    stored = join(case.dense["gate"], case.dense["up"])
    stored = stored.mT.contiguous().mT if "transposed" in layout else stored
    whole = DenseSide(stored, join(case.bias["gate"], case.bias["up"]))
    for i, name in enumerate(("gate", "up")):
        case.sides[name] = whole.half(i, "interleaved" in layout)
    check(case)


@pytest.mark.parametrize("pattern", [Pattern(1, 1, 32), Pattern(1, 2, 32), Pattern(2, 4, 32), Pattern(1, 2, 32, 16)])
def test_packed_gate_and_up_of_one_storage(pattern):
    """The up projection begins within the storage, and within a group of blocks that share a choice."""
    case = Experts(spec_of("float32", pattern), experts=3, hidden=40, width=24, bias=True)
    both, packed = prune(join_rows(case.dense["gate"], case.dense["up"]), pattern)
    bias = interleave(case.bias["gate"], case.bias["up"])
    whole = PackedSide(packed.values, packed.metadata, packed.selection, pattern, 48, bias=bias)
    for i, name in enumerate(("gate", "up")):
        case.dense[name], case.sides[name] = both.chunk(2, 1)[i], whole.half(i, alternate=True)
    check(case)


@pytest.mark.parametrize("slots", [16, 64])
def test_work_list(slots):
    """Every slot of an expert is in one tile, and the list is long enough."""
    for counts in ([0, 0, 0], [1, 0, 200], [16, 17, 64], [0, 65, 128, 1, 0]):
        ids = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)] + [-1] * 5).view(-1, 1)
        plan = route(ids[torch.randperm(len(ids))], len(counts))
        tiles = work_list(plan.offsets_E, ids.numel(), slots)
        assert tiles.shape == (most_tiles(ids.numel(), len(counts), slots), 4)
        found = [(e, s) for e, first, n, _ in tiles.tolist() for s in range(first, first + n)]
        assert sorted(found, key=lambda pair: pair[1]) == [
            (e, s) for s, e in enumerate(plan.expert_S.tolist()) if e < len(counts)
        ]
        assert all(0 <= n <= slots for _, _, n, _ in tiles.tolist())


def test_combine_reads_nothing_of_nobody():
    """Not their rows, which may be anything, and not their weights."""
    ids = torch.tensor([[0, -1], [5, 1], [-1, 9]])
    plan = route(ids, 2)
    y = torch.full((6, 700), float("nan"), dtype=torch.bfloat16)
    y[:2] = torch.tensor([[2.0], [3.0]])
    weights = torch.tensor([[0.5, float("nan")], [float("inf"), 1.0], [float("nan"), 1.0]])
    out = torch.full((3, 800), float("nan"))[:, :700]
    combine(y, plan.slot_TK, weights, plan.offsets_E, out)
    assert torch.equal(out, torch.tensor([[1.0], [3.0], [0.0]]).expand(3, 700))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinite_rows_stay_where_they_are():
    """What one token holds does not reach another of the same tile."""
    case = Experts(spec_of("float32", Pattern(1, 2, 32)), experts=1, hidden=64, width=32)
    x, ids, weights = case.randn(4, 64), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    before = run(case, x, ids, weights)
    x[1] = float("inf")
    after = run(case, x, ids, weights)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not after[1].isfinite().all()


def test_same_bits_whatever_else_is_there():
    """A token alone gives what it gives among others."""
    case = Experts(spec_of("float32", Pattern(1, 2, 32)), experts=3, hidden=64, width=32)
    x, ids, weights = case.randn(9, 64), torch.randint(3, (9, 2)), torch.rand(9, 2)
    together = run(case, x, ids, weights)
    for t in (0, 4, 8):
        assert torch.equal(run(case, x[t : t + 1], ids[t : t + 1], weights[t : t + 1])[0], together[t])


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("one == 0", "one == 1"),
        ("k // VECTOR", "0"),
        ("// top_k\n", "// (top_k + 1)\n"),
        ("col_live = k + col < cols", "col_live = k + col < cols - 1"),
        ("up_choice == 1", "up_choice == 0"),
    ],
)
def test_planted_errors_are_seen(wrong, right, monkeypatch):
    from samoyeds_codegen.triton.emit import emit
    from tests.codegen.triton import cases

    def planted(spec):
        text = emit(spec)
        assert spec.op == "down" or wrong in text
        return Projection(spec, text.replace(wrong, right))

    case = Experts(spec_of("float32", Pattern(1, 2, 32)), experts=3, hidden=64, width=32)
    monkeypatch.setattr(cases, "projection", planted)
    with pytest.raises(AssertionError):
        check(case)


def test_result_is_in_the_dtype_of_the_output():
    case = Experts(spec_of("bfloat16"), experts=2, hidden=32, width=16)
    plan = route(torch.tensor([[0], [1]]), 2)
    out = torch.full((2, 16), float("nan"))
    Projection(KernelSpec("up", case.spec, TILE))(
        case.randn(2, 32), plan.order_S, 1, work_list(plan.offsets_E, 2, 16),
        {"gate": case.sides["gate"], "up": case.sides["up"]}, out,
    )  # fmt: skip
    assert out.isfinite().all() and not torch.equal(out, out.bfloat16().float())
