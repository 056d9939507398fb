"""Bugs planted into the text of kernels: the emulator or float64 finds each, so these tests can fail."""

from dataclasses import replace

import pytest
import torch

from samoyeds_codegen import emulate
from samoyeds_codegen.cuda.block import plan_block
from samoyeds_codegen.cuda.emit import emit
from samoyeds_codegen.cuda.pattern import Pattern
from tests.codegen.cuda import emulated
from tests.codegen.cuda.blocks import Case, reference, routing

CASE = Case(Pattern(1, 2, 32), hidden=900, width=64)
WIDE = replace(CASE, width=128)
"""Two pieces of rows, for two blocks."""
LONG = replace(CASE, pattern=Pattern(1, 2, 64))
"""Vectors that registers may hold."""
MMA, WGMMA = "sm_80", "sm_90a"
UNORDERED = (emulate.RaceError, emulate.UninitialisedError, emulate.InFlightError)


def run_with(target: str, right: str, wrong: str, tile: int | None = None, weights: str = "shared") -> float:
    """The relative error of a block whose first projection has ``wrong`` in place of ``right``."""
    case = WIDE if tile else CASE if weights == "shared" else LONG
    x = torch.randn(5, case.hidden, generator=torch.Generator().manual_seed(0)).to(case.dtype)
    ids = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1], [1, 0]])
    plan = routing(ids, case.experts)
    block = plan_block(x, case.packed(), plan, target, 2 if tile else 1, torch.float32, tile, weights)
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
        (MMA, "blockIdx.x % row_groups", "blockIdx.x % (row_groups + 1)", emulate.RaceError),
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
        ("mbarrier_expect(ring.full(turn), PIECE_BYTES)", "mbarrier_arrive(ring.full(turn))", emulate.EmulationError),
        ("      ptx::bulk_copy_peer(", "      if (rank()) ptx::bulk_copy_peer(", emulate.DeadlockError),
        ("  if constexpr (CLUSTER > 1) together();", "", emulate.BarrierError),
        ("    ptx::cluster_sync();\n  else", "    __syncthreads();\n  else", (emulate.BarrierError, emulate.RaceError)),
        ("  ptx::fence_proxy_async();\n  if", "  if", emulate.MissingFenceError),
    ],
)  # fmt: skip
def test_misuse_of_pairs(right, wrong, error) -> None:
    with pytest.raises(error):
        run_with(WGMMA, right, wrong, 256)


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
        assert run_with(WGMMA, right, wrong, 256) > 0.05
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
        run_with(WGMMA, right, wrong, weights="registers")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("IN_REGISTERS ? chunk % 4 * 2 + chunk / 4 : chunk", "chunk"),
        ("bytes = q | (q + 4) << 4", "bytes = 2 * q | (2 * q + 1) << 4"),
        ("second ? own.x : own.y, 1)", "second ? own.x : own.y, 2)"),
        ("    ask(block + 1);", "    ask(block);"),
    ],
)
def test_wrong_numbers_from_registers(right, wrong) -> None:
    assert run_with(WGMMA, right, wrong, weights="registers") > 0.05


def test_nothing_planted_in_registers() -> None:
    assert run_with(WGMMA, "namespace samoyeds {", "namespace samoyeds {", weights="registers") < 2e-3


@pytest.mark.parametrize("target", [MMA, WGMMA])
def test_nothing_planted(target) -> None:
    for tile in (None, 256) if target == WGMMA else (None,):
        assert run_with(target, "namespace samoyeds {", "namespace samoyeds {", tile) < 2e-3
