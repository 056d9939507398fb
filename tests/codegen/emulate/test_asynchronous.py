"""mbarriers, bulk copies, named barriers and clusters: a producer and its consumers; and planted bugs in them."""

import pytest
import torch

from samoyeds_codegen import emulate
from samoyeds_codegen.emulate import (
    BarrierError,
    DeadlockError,
    InFlightError,
    MisalignedError,
    MissingFenceError,
    OperandError,
    OutOfBoundsError,
    Output,
    RaceError,
    UninitialisedError,
)

# Warp 0 copies rows of 256 bytes, by one bulk copy (first half) and cp.async (second half); warp 1 sums them.
RING = """
constexpr int STAGES = 3, ROW = 256;
struct P { const unsigned char* x; int* out; int turns; };
__global__ void __launch_bounds__(64) ring(const __grid_constant__ P p) {
  SAMOYEDS_SHARED(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t base = ptx::shared_address(shared), full = base + STAGES * ROW, empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(full + 8 * i, 33);
      ptx::mbarrier_init(empty + 8 * i, 1);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (warp == 0) {
    for (int turn = 0; turn < p.turns; ++turn) {
      const uint32_t stage = turn % STAGES, parity = turn / STAGES & 1;
      ptx::mbarrier_wait(empty + 8 * stage, parity ^ 1);
      if (lane == 0) {
        ptx::mbarrier_expect(full + 8 * stage, 128);
        ptx::bulk_copy(base + stage * ROW, p.x + turn * ROW, 128, full + 8 * stage);
      }
      ptx::cp_async<4>(base + stage * ROW + 128 + 4 * lane, p.x + turn * ROW + 128 + 4 * lane, true);
      ptx::cp_async_mbarrier_arrive(full + 8 * stage);
    }
  } else {
    int sum = 0;
    for (int turn = 0; turn < p.turns; ++turn) {
      const uint32_t stage = turn % STAGES, parity = turn / STAGES & 1;
      ptx::mbarrier_wait(full + 8 * stage, parity);
      const int* row = reinterpret_cast<const int*>(shared + stage * ROW);
      sum += row[lane] + 1000 * row[32 + lane];
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);
    }
    p.out[lane] = sum;
  }
}
"""


def ring(text: str = RING, seed: int = 0, turns: int = 8) -> None:
    x = torch.randint(100, (turns, 2, 32), dtype=torch.int32)
    out = torch.empty(32, dtype=torch.int32)
    emulate.run(text, "ring", (1,), (64,), 3 * 256 + 6 * 8, [x, Output(out), turns], seed=seed)
    assert torch.equal(out, (x[:, 0] + 1000 * x[:, 1]).sum(0, dtype=torch.int32))


@pytest.mark.parametrize("seed", range(4))
def test_ring(seed: int) -> None:
    ring(seed=seed)


RIGHT = {
    "one lane waits for its warp": (
        "ptx::mbarrier_wait(full + 8 * stage, parity);",
        "if (lane == 0) ptx::mbarrier_wait(full + 8 * stage, parity);\n      __syncwarp();",
    ),
    "all lanes release": ("if (lane == 0) ptx::mbarrier_arrive(empty", "ptx::mbarrier_arrive(empty"),
    "copies waited for by their thread": (
        "ptx::cp_async_mbarrier_arrive(full + 8 * stage);",
        "ptx::cp_async_commit();\n      ptx::cp_async_wait<0>();\n      ptx::mbarrier_arrive(full + 8 * stage);",
    ),
    "bytes expected first, bulk copy from another lane": (
        "ptx::bulk_copy(",
        "}\n      __syncwarp();\n      if (lane == 7) {\n        ptx::bulk_copy(",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_other_ways_to_do_it_right(name: str) -> None:
    one, other = RIGHT[name]
    assert one in RING
    text = RING.replace(one, other)
    if name == "all lanes release":
        text = text.replace("empty + 8 * i, 1", "empty + 8 * i, 32")
    ring(text, seed=1)


RACE = (RaceError, InFlightError)
MISTAKES = {
    "init without fence": ("ptx::fence_barrier_init();", "", MissingFenceError),
    "init without barrier": ("__syncthreads();", "", (RaceError, BarrierError)),
    "init twice": ("ptx::mbarrier_init(empty + 8 * i, 1);", "ptx::mbarrier_init(full, 1);", BarrierError),
    "count too high": ("full + 8 * i, 33", "full + 8 * i, 34", DeadlockError),
    "count too low": ("full + 8 * i, 33", "full + 8 * i, 32", (*RACE, BarrierError)),
    "count of nothing": ("full + 8 * i, 33", "full + 8 * i, 0", BarrierError),
    "wrong parity": ("empty + 8 * stage, parity ^ 1", "empty + 8 * stage, parity", DeadlockError),
    "no wait for the copies": ("ptx::mbarrier_wait(full + 8 * stage, parity);", "", (*RACE, UninitialisedError)),
    "no wait for the readers": ("ptx::mbarrier_wait(empty + 8 * stage, parity ^ 1);", "", (*RACE, BarrierError)),
    "released too early": ("__syncwarp();", "", RaceError),
    "more bytes expected": ("full + 8 * stage, 128", "full + 8 * stage, 160", DeadlockError),
    "fewer bytes expected": ("full + 8 * stage, 128", "full + 8 * stage, 112", (*RACE, DeadlockError)),
    "no release": ("if (lane == 0) ptx::mbarrier_arrive(empty + 8 * stage);", "", DeadlockError),
    "all lanes release": ("if (lane == 0) ptx::mbarrier_arrive", "ptx::mbarrier_arrive", (*RACE, BarrierError)),
    "not a barrier": ("full + 8 * stage, parity", "full + 8 * stage + 256, parity", OutOfBoundsError),
    "not an mbarrier": ("full + 8 * stage, parity", "base, parity", BarrierError),
    "barrier overwritten": ("base + stage * ROW, p.x", "full - 16, p.x", (BarrierError, OutOfBoundsError)),
    "misaligned bulk copy": ("base + stage * ROW, p.x", "base + stage * ROW + 8, p.x", MisalignedError),
    "bulk copy of 120 bytes": ("p.x + turn * ROW, 128", "p.x + turn * ROW, 120", MisalignedError),
    "bulk copy beyond its source": ("p.x + turn * ROW, 128", "p.x + 2 * turn * ROW, 128", OutOfBoundsError),
    "parity of a count": ("full + 8 * stage, parity", "full + 8 * stage, parity + 2", OperandError),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_bug(name: str) -> None:
    right, wrong, error = MISTAKES[name]
    assert right in RING
    with pytest.raises(error) as caught:
        ring(RING.replace(right, wrong))
    assert caught.value.where.line > 0


def test_deadlock_says_what_is_owed() -> None:
    with pytest.raises(DeadlockError, match=r"phase 0 and still needs 0 arrivals and 32 bytes; threads 0 to 31"):
        ring(RING.replace("full + 8 * stage, 128", "full + 8 * stage, 160"))


def test_generic_writes_before_a_bulk_copy_need_a_fence() -> None:
    cleared = "__syncthreads();\n  shared[4 * threadIdx.x] = 0;\n  {}__syncthreads();"
    ring(RING.replace("__syncthreads();", cleared.format("ptx::fence_proxy_async();\n  ")))
    with pytest.raises(MissingFenceError):
        ring(RING.replace("__syncthreads();", cleared.format("")))


def test_arrival_beyond_the_count() -> None:
    twice = "ptx::mbarrier_expect(full + 8 * stage, 64); ptx::mbarrier_expect(full + 8 * stage, 64);"
    text = RING.replace("full + 8 * i, 33", "full + 8 * i, 1").replace(
        "ptx::cp_async_mbarrier_arrive(full + 8 * stage);", ""
    )
    with pytest.raises(BarrierError, match="an arrival more than its count of 1"):
        ring(text.replace("ptx::mbarrier_expect(full + 8 * stage, 128);", twice))


def test_block_must_wait_for_its_bulk_copies() -> None:
    with pytest.raises(InFlightError, match="the block returned"):
        ring(
            RING.replace(
                "turn < p.turns; ++turn) {\n      const uint32_t stage",
                "turn < 1; ++turn) {\n      const uint32_t stage",
                1,
            ).replace("} else {", "} else if (p.turns == 0) {")
        )


# Warps 0 and 1 hand buffers to warps 2 and 3 through two named barriers.
NAMED = """
struct P { int* out; };
__global__ void named(P p) {
  SAMOYEDS_SHARED(shared);
  int* v = reinterpret_cast<int*>(shared);
  const int t = threadIdx.x;
  for (int i = 0; i < 4; ++i) {
    if (t < 64) {
      if (i) ptx::named_barrier_sync(2, 128);
      v[t] = 100 * i + t;
      ptx::named_barrier_arrive(1, 128);
    } else {
      ptx::named_barrier_sync(1, 128);
      p.out[i * 64 + t - 64] = v[127 - t];
      if (i < 3) ptx::named_barrier_arrive(2, 128);
    }
  }
}
"""


def named(text: str = NAMED, seed: int = 0) -> torch.Tensor:
    out = torch.empty(4, 64, dtype=torch.int32)
    emulate.run(text, "named", (1,), (128,), 256, [Output(out)], seed=seed)
    return out


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_named_barriers(seed: int) -> None:
    assert torch.equal(named(seed=seed).long(), 100 * torch.arange(4)[:, None] + torch.arange(63, -1, -1))


NAMED_MISTAKES = {
    "too many threads": ("named_barrier_sync(1, 128)", "named_barrier_sync(1, 256)", BarrierError),
    "other count": ("named_barrier_sync(1, 128)", "named_barrier_sync(1, 96)", BarrierError),
    "no whole warps": ("named_barrier_sync(1, 128)", "named_barrier_sync(1, 100)", BarrierError),
    "no such barrier": ("named_barrier_sync(1, 128)", "named_barrier_sync(16, 128)", BarrierError),
    "another barrier": ("named_barrier_sync(1, 128)", "named_barrier_sync(3, 128)", (DeadlockError, BarrierError)),
    "half the threads": ("(1, 128)", "(1, 64)", (RaceError, BarrierError, UninitialisedError)),
    "no way back": ("if (i) ptx::named_barrier_sync(2, 128);", "", (RaceError, BarrierError)),
    "missing thread": ("ptx::named_barrier_arrive(1, 128)", "if (t) ptx::named_barrier_arrive(1, 128)", DeadlockError),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED_MISTAKES)
def test_planted_bug_of_named_barriers(name: str) -> None:
    right, wrong, error = NAMED_MISTAKES[name]
    assert right in NAMED
    with pytest.raises(error):
        named(NAMED.replace(right, wrong))


# A cluster of two: each block copies half of a row into both.
MULTICAST = """
struct P { const int* x; int* out; };
__global__ void __cluster_dims__(2) multicast(P p) {
  SAMOYEDS_SHARED(shared);
  const uint32_t base = ptx::shared_address(shared), barrier = base + 256, rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_barrier_init();
    ptx::mbarrier_expect(barrier, 256);
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0)
    ptx::bulk_copy_multicast(base + rank * 128, p.x + blockIdx.x / 2 * 64 + rank * 32, 128, barrier, 3);
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < 64; i += 32)
    p.out[blockIdx.x * 64 + i] = reinterpret_cast<int*>(shared)[i] + rank;
  ptx::cluster_sync();
}
"""


def multicast(text: str = MULTICAST, seed: int = 0) -> None:
    x, out = torch.randint(1000, (3, 64), dtype=torch.int32), torch.empty(6, 64, dtype=torch.int32)
    emulate.run(text, "multicast", (6,), (32,), 264, [x, Output(out)], cluster=2, seed=seed)
    assert torch.equal(out, x.repeat_interleave(2, 0) + torch.arange(6, dtype=torch.int32)[:, None] % 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_multicast(seed: int) -> None:
    multicast(seed=seed)


CLUSTER_MISTAKES = {
    "other block not ready": ("ptx::cluster_sync();\n  if", "__syncthreads();\n  if", (BarrierError, RaceError)),
    "blocks outside the cluster": ("barrier, 3", "barrier, 7", OperandError),
    "half of the bytes": ("barrier, 3", "barrier, 1 << rank", DeadlockError),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTER_MISTAKES)
def test_planted_bug_of_clusters(name: str) -> None:
    right, wrong, error = CLUSTER_MISTAKES[name]
    assert right in MULTICAST
    with pytest.raises(error):
        multicast(MULTICAST.replace(right, wrong))


# Block 1 tells block 0 through block 0's mbarrier that it is ready; then block 0 copies into both.
REMOTE = """
struct P { const int* x; int* out; int stays; };
__global__ void remote(P p) {
  SAMOYEDS_SHARED(shared);
  const uint32_t base = ptx::shared_address(shared), full = base + 128, ready = full + 8, rank = ptx::cluster_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(ready, 1);
    ptx::fence_barrier_init();
    ptx::mbarrier_expect(full, 128);
  }
  ptx::cluster_sync();
  if (rank == 1 && threadIdx.x == 0) ptx::mbarrier_arrive_cluster(ready, 0);
  if (rank == 1 && !p.stays) return;
  if (rank == 0 && threadIdx.x == 0) {
    ptx::mbarrier_wait(ready, 0);
    ptx::bulk_copy_multicast(base, p.x, 128, full, 3);
  }
  ptx::mbarrier_wait(full, 0);
  p.out[rank * 32 + threadIdx.x] = reinterpret_cast<int*>(shared)[threadIdx.x];
}
"""


def remote(stays: int, text: str = REMOTE, seed: int = 0) -> None:
    x, out = torch.randint(1000, (32,), dtype=torch.int32), torch.empty(2, 32, dtype=torch.int32)
    emulate.run(text, "remote", (2,), (32,), 144, [x, Output(out), stays], cluster=2, seed=seed)
    assert torch.equal(out, x.expand(2, 32))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_arrival_in_another_block(seed: int) -> None:
    remote(1, seed=seed)


def test_block_that_returned_is_no_target() -> None:
    with pytest.raises(BarrierError, match="block 1 of the cluster has exited"):
        remote(0)


# Each block of a pair writes a row and sends it to the other one, twice; the other says when it has read it.
PEERS = """
struct P { int* out; };
__global__ void __cluster_dims__(2) peers(P p) {
  SAMOYEDS_SHARED(shared);
  const uint32_t base = ptx::shared_address(shared), full = base + 256, empty = full + 8;
  const uint32_t rank = ptx::cluster_rank(), mine = base + rank * 128;
  int* const rows = reinterpret_cast<int*>(shared);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 64);
    ptx::fence_barrier_init();
  }
  ptx::cluster_sync();
  for (int turn = 0; turn < 2; ++turn) {
    if (turn) ptx::mbarrier_wait(empty, 0);
    rows[rank * 32 + threadIdx.x] = blockIdx.x * 1000 + turn * 100 + threadIdx.x;
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      ptx::bulk_copy_peer(mine, mine, 128, full, rank ^ 1);
      ptx::mbarrier_expect(full, 128);
    }
    ptx::mbarrier_wait(full, turn);
    for (int i = 0; i < 2; ++i)
      p.out[((blockIdx.x * 2 + turn) * 2 + i) * 32 + threadIdx.x] = rows[i * 32 + threadIdx.x];
    ptx::mbarrier_arrive(empty);
    ptx::mbarrier_arrive_cluster(empty, rank ^ 1);
  }
  ptx::cluster_sync();
}
"""


def peers(text: str = PEERS, seed: int = 0) -> None:
    out = torch.empty(4, 2, 2, 32, dtype=torch.int32)
    emulate.run(text, "peers", (4,), (32,), 272, [Output(out)], cluster=2, seed=seed)
    block, turn, half, i = torch.meshgrid(*map(torch.arange, out.shape), indexing="ij")
    assert torch.equal(out, ((block // 2 * 2 + half) * 1000 + turn * 100 + i).int())


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_copy_to_another_block(seed: int) -> None:
    peers(seed=seed)


PEER_MISTAKES = {
    "not fenced": ("    ptx::fence_proxy_async();\n", "", MissingFenceError),
    "other threads are not done": ("    __syncthreads();\n", "", (RaceError, UninitialisedError)),
    "source overwritten": ("mbarrier_init(empty, 64)", "mbarrier_init(empty, 32)", (RaceError, InFlightError)),
    "bytes not expected": ("mbarrier_expect(full, 128)", "mbarrier_arrive(full)", (DeadlockError, UninitialisedError)),
    "not waited for": ("    ptx::mbarrier_wait(full, turn);\n", "", (InFlightError, RaceError, UninitialisedError)),
    "to itself": ("full, rank ^ 1", "full, rank", OperandError),
    "outside the cluster": ("full, rank ^ 1", "full, rank + 2", OperandError),
    "odd size": ("mine, 128, full", "mine, 120, full", MisalignedError),
    "exits early": ("  ptx::cluster_sync();\n}", "}", BarrierError),
}  # fmt: skip


@pytest.mark.parametrize("name", PEER_MISTAKES)
def test_planted_bug_of_copies_to_another_block(name: str) -> None:
    """Under some schedule at least."""
    right, wrong, error = PEER_MISTAKES[name]
    assert right in PEERS
    with pytest.raises(error):
        for seed in range(8):
            peers(PEERS.replace(right, wrong), seed)


def test_no_such_block_to_arrive_in() -> None:
    with pytest.raises(OperandError, match="the cluster has no block 2"):
        remote(1, REMOTE.replace("(ready, 0);\n  if (rank == 1 &&", "(ready, 2);\n  if (rank == 1 &&"))
