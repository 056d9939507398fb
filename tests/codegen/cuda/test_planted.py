"""Bugs planted into the text of kernels: the emulator or float64 finds each, so these tests can fail."""

from dataclasses import replace

import pytest
import torch

from samoyeds_codegen import emulate
from samoyeds_codegen.cuda.block import plan_block
from samoyeds_codegen.cuda.emit import emit
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.spec import VARIANTS
from tests.codegen.cuda import emulated
from tests.codegen.cuda.blocks import Case, reference, routing

CASE = Case(Pattern(1, 2, 32), hidden=900, width=64)
CASES = {
    "pairs": replace(CASE, width=128),  # pieces of rows for two blocks
    "token_pairs": replace(CASE, width=256),
    "registers": replace(CASE, pattern=Pattern(1, 2, 64)),  # vectors that registers may hold
    "register_pairs": replace(CASE, pattern=Pattern(1, 2, 64), width=256),
}
MMA, WGMMA = "sm_80", "sm_90a"
UNORDERED = (emulate.RaceError, emulate.UninitialisedError, emulate.InFlightError)


def run_with(target: str, right: str, wrong: str, variant: str = "wgmma") -> float:
    """The relative error of a block whose first projection has ``wrong`` in place of ``right``."""
    case = CASES.get(variant, CASE)
    x = torch.randn(5, case.hidden, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    ids = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [1, 0]])
    plan = routing(ids, case.experts)
    how = VARIANTS[variant]
    tile = 256 if how.shares_weights else 32 if how.shares_tokens else None
    block = plan_block(x, case.packed(), plan, target, how.cluster, torch.float32, tile, how)
    for i, launch in enumerate(block.launches):
        text = emit(launch.spec)
        assert i != 1 or text.count(right) == 1
        emulated.run(launch, text=text.replace(right, wrong) if i == 1 else text)
    expected = reference(case, x, ids, plan.weights_TK)
    return float((block.out_TH - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("target", "right", "wrong", "error"),
    [
        (MMA, "cp_async_wait<STAGES - 2>", "cp_async_wait<STAGES - 1>", emulate.InFlightError),
        (MMA, "    __syncthreads();  // the copies", "    // the copies", emulate.UninitialisedError),
        (MMA, "first + rest % width", "first", emulate.RaceError),
        (MMA, "rest / width}", "rest / width + 1}", emulate.OutOfBoundsError),
        (MMA, "column + chunk * 8 < columns", "true", emulate.OutOfBoundsError),
        (WGMMA, "  ptx::fence_proxy_async();\n  if", "  if", emulate.MissingFenceError),
        (WGMMA, "    ptx::wgmma_fence();\n", "", emulate.MissingFenceError),
        (WGMMA, "    ptx::wgmma_wait<0>();\n", "", emulate.InFlightError),
        (WGMMA, "ring.parity(turn) ^ 1", "ring.parity(turn)", emulate.DeadlockError),
        (WGMMA, "      __syncwarp();  // all lanes", "      // all lanes", emulate.RaceError),
    ],
)  # fmt: skip
def test_misuse(target, right, wrong, error) -> None:
    with pytest.raises(error):
        run_with(target, right, wrong)


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        (MMA, "multiply<STEP % 2>(", "multiply<0>("),
        (MMA, "    ask(block + 1);", "    ask(block);"),
        (MMA, "(before.upper == k) - (now.upper == k)", "(before.upper == k)"),
        (MMA, "STEP < 2 ? metadata[r].x : metadata[r].y", "metadata[r].x"),
        (WGMMA, "uint64_t(256 >> 4) << 32", "uint64_t(128 >> 4) << 32"),
        (WGMMA, "store(a, slot, slab * 8 + row, h)", "store(a, slot, slab * 8 + (row ^ 1), h)"),
    ],
)
def test_wrong_numbers(target, right, wrong) -> None:
    assert run_with(target, right, wrong) > 0.05


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ("    ptx::named_barrier_sync(1, GROUP_THREADS);\n", "", UNORDERED),
        ("CONSUMERS * 4 * CLUSTER", "CONSUMERS * 4", emulate.EmulationError),
        ("(CLUSTER > 1) ptx::mbarrier_arrive_c", "(CLUSTER > 2) ptx::mbarrier_arrive_c", emulate.DeadlockError),
        ("ptx::mbarrier_expect(ring.full(turn), send_half(ring, turn))",
         "(send_half(ring, turn), ptx::mbarrier_arrive(ring.full(turn)))", emulate.EmulationError),
        ("  ptx::bulk_copy_peer(from", "  if (rank()) ptx::bulk_copy_peer(from", emulate.DeadlockError),
        ("  if constexpr (CLUSTER > 1) together();", "", emulate.BarrierError),
        ("    ptx::cluster_sync();\n  else", "    __syncthreads();\n  else", (emulate.BarrierError, emulate.RaceError)),
        ("  ptx::fence_proxy_async();\n  if", "  if", emulate.MissingFenceError),
    ],
)  # fmt: skip
def test_misuse_of_pairs(right, wrong, error) -> None:
    with pytest.raises(error):
        run_with(WGMMA, right, wrong, "pairs")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("const int before = int(rank()) * TOKENS", "const int before = 0 * TOKENS"),
        ("work.row_tile(piece) + mine", "work.row_tile(piece)"),
    ],
)
def test_wrong_numbers_of_pairs(right, wrong) -> None:
    """Both blocks computing the first tokens is a race for the same rows."""
    try:
        assert run_with(WGMMA, right, wrong, "pairs") > 0.05
    except emulate.RaceError:
        assert "before" in right


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ("    ptx::wgmma_wait<0>();\n", "", emulate.InFlightError),
        ("  ptx::fence_proxy_async();\n  if", "  if", emulate.MissingFenceError),
        ("const bool exists = column < columns;\n      asked", "const bool exists = true;\n      asked",
         emulate.OutOfBoundsError),
    ],
)  # fmt: skip
def test_misuse_of_registers(right, wrong, error) -> None:
    with pytest.raises(error):
        run_with(WGMMA, right, wrong, variant="registers")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("IN_REGISTERS ? chunk % 4 * 2 + chunk / 4 : chunk", "chunk"),
        ("bytes = q | (q + 4) << 4", "bytes = 2 * q | (2 * q + 1) << 4"),
        ("second ? own.x : own.y, 1)", "second ? own.x : own.y, 2)"),
        ("2 * half + 1], row);\n    ask(block + 1);", "2 * half + 1], row);\n    ask(block);"),
    ],
)
def test_wrong_numbers_from_registers(right, wrong) -> None:
    assert run_with(WGMMA, right, wrong, variant="registers") > 0.05


@pytest.mark.parametrize("variant", ["token_pairs", "register_pairs"])
@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ("    ptx::named_barrier_sync(1, GROUP_THREADS);\n", "", UNORDERED),
        ("CONSUMERS * 4 * CLUSTER", "CONSUMERS * 4", emulate.EmulationError),
        ("half < 2; ++half) send", "half < 1; ++half) send", emulate.DeadlockError),
        ("  ptx::fence_proxy_async();\n  if", "  if", emulate.MissingFenceError),
        ("TOKENS_SHARED ? int(rank()) * TokenRows::COPIED : 0", "0", UNORDERED),
    ],
)  # fmt: skip
def test_misuse_of_shared_tokens(right, wrong, error, variant) -> None:
    with pytest.raises(error):
        run_with(WGMMA, right, wrong, variant)


def test_rows_of_shared_tokens() -> None:
    """Both blocks computing the same rows is a race for them, or leaves the others unwritten."""
    with pytest.raises(emulate.RaceError):
        run_with(WGMMA, "first + int(rank()) * CONSUMERS", "first", "token_pairs")


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_planted(variant) -> None:
    assert run_with(WGMMA, "namespace samoyeds {", "namespace samoyeds {", variant) < 2e-3


def test_nothing_planted_for_warps() -> None:
    assert run_with(MMA, "namespace samoyeds {", "namespace samoyeds {") < 2e-3
