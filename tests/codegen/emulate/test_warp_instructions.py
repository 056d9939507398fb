"""mma.sp, ldmatrix and cp.async against float64, and planted bugs in a pipeline of them."""

import pytest
import torch
from torch import Tensor

from samoyeds_codegen import emulate
from samoyeds_codegen.emulate import Output
from tests.codegen.emulate.fragments import (
    a_fragment,
    accumulator,
    b_fragment,
    metadata_fragment,
    sparse_matrix,
)

TYPES = {torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}

MMA = """
struct P { const uint4* a; const uint4* b; const uint32_t* metadata; float* c; };
template <class T, int SELECTOR> __device__ __forceinline__ void multiply(const P& p) {
  const int lane = threadIdx.x;
  const uint4 x = p.a[lane], y = p.b[lane];
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = p.c[4 * lane + i];
  ptx::mma_sp_m16n8k32<T, SELECTOR>(d, a, b, p.metadata[lane]);
  for (int i = 0; i < 4; ++i) p.c[4 * lane + i] = d[i];
}
__global__ void bf16_0(P p) { multiply<__nv_bfloat16, 0>(p); }
__global__ void bf16_1(P p) { multiply<__nv_bfloat16, 1>(p); }
__global__ void f16_0(P p) { multiply<__half, 0>(p); }
__global__ void f16_1(P p) { multiply<__half, 1>(p); }
"""


def run_mma(dtype: torch.dtype, selector: int, metadata: Tensor, values: Tensor, b: Tensor, c: Tensor) -> Tensor:
    kernel = f"{'bf16' if dtype == torch.bfloat16 else 'f16'}_{selector}"
    arguments = [a_fragment(values), b_fragment(b), metadata, c]
    emulate.run(MMA, kernel, (1,), (32,), 0, arguments)
    return accumulator(c)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("dtype", TYPES)
def test_mma_sp(dtype: torch.dtype, selector: int) -> None:
    dense, values, positions = sparse_matrix(16, 32, dtype)
    b, c = torch.randn(32, 8).to(dtype), torch.randn(32, 4)
    expected = accumulator(c).double() + dense @ b.double()
    # Lanes that do not count may hold anything, even what would be invalid.
    metadata = metadata_fragment(positions, selector, others=-1)
    result = run_mma(dtype, selector, metadata, values, b, c)
    assert torch.allclose(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_metadata_must_ascend() -> None:
    _, values, positions = sparse_matrix(16, 32, torch.bfloat16)
    positions[3, 4:6] = torch.tensor([2, 1])
    with pytest.raises(emulate.MetadataError, match=r"group 2 of metadata .*: positions 2 and 1") as caught:
        metadata = metadata_fragment(positions, 0)
        run_mma(torch.bfloat16, 0, metadata, values, torch.ones(32, 8).bfloat16(), torch.zeros(32, 4))
    assert caught.value.where.thread == (12, 0, 0)
    assert caught.value.where.instruction == "mma_sp_m16n8k32"


LDMATRIX = """
struct P { const uint4* rows; uint32_t* out; int which; };
__global__ void load(P p) {
  SAMOYEDS_SHARED(shared);
  const int lane = threadIdx.x;
  reinterpret_cast<uint4*>(shared)[lane] = p.rows[lane];
  __syncwarp();
  const uint32_t address = ptx::shared_address(shared) + 16 * lane;
  uint32_t r[4] = {}, half[2] = {};
  if (p.which == 0) ptx::ldmatrix_x4(r, address);
  if (p.which == 1) ptx::ldmatrix_x4_trans(r, address);
  if (p.which == 2) ptx::ldmatrix_x2(half, address);
  if (p.which == 3) ptx::ldmatrix_x2_trans(half, address);
  for (int i = 0; i < 4; ++i) p.out[4 * lane + i] = p.which < 2 ? r[i] : i < 2 ? half[i] : 0;
}
"""


@pytest.mark.parametrize("which", range(4))
def test_ldmatrix(which: int) -> None:
    rows = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.empty(32, 4, dtype=torch.int32)
    emulate.run(LDMATRIX, "load", (1,), (32,), 512, [rows, Output(out), which])
    matrices = rows.mT if which % 2 else rows
    expected = matrices.reshape(4, 32, 2).transpose(0, 1).clone()  # lane 4 g + q: row g, columns 2 q and 2 q + 1
    if which >= 2:
        expected[:, 2:] = 0
    assert torch.equal(out.view(torch.int16).view(32, 4, 2), expected)


# A block of two warps sums, over stages in shared memory, what each thread's neighbour copied.
PIPELINE = """
struct P { const uint4* x; uint4* out; int turns; int valid; };
__global__ void pipeline(P p) {
  SAMOYEDS_SHARED(shared);
  uint4* stages = reinterpret_cast<uint4*>(shared);
  const int t = threadIdx.x;
  uint4 sum = {0, 0, 0, 0};
  for (int turn = 0; turn < 2; ++turn) {
    ptx::cp_async<16>(ptx::shared_address(stages + turn * 64 + t), p.x + turn * 64 + t, t < p.valid);
    ptx::cp_async_commit();
  }
  for (int turn = 0; turn < p.turns; ++turn) {
    ptx::cp_async_wait<1>();
    __syncthreads();
    const uint4 y = stages[turn % 3 * 64 + (t ^ 63)];
    sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w;
    const int next = turn + 2;
    if (next < p.turns)
      ptx::cp_async<16>(ptx::shared_address(stages + next % 3 * 64 + t), p.x + next * 64 + t, t < p.valid);
    ptx::cp_async_commit();
  }
  p.out[t] = sum;
}
"""


def pipeline(text: str = PIPELINE, *, turns: int = 7, valid: int = 64, seed: int = 0, shared_bytes: int = 3072) -> None:
    x = torch.randint(1000, (turns, 64, 4), dtype=torch.int32)
    out = torch.empty(64, 4, dtype=torch.int32)
    emulate.run(text, "pipeline", (1,), (64,), shared_bytes, [x, Output(out), turns, valid], seed=seed)
    x[:, valid:] = 0
    assert torch.equal(out, x.sum(0, dtype=torch.int32).flip(0))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("valid", [64, 50])
def test_pipeline(valid: int, seed: int) -> None:
    pipeline(valid=valid, seed=seed)


# One mistake, several ways to see it: which thread comes first is the schedule's choice.
FIRST_SEEN = (emulate.InFlightError, emulate.RaceError, emulate.UninitialisedError)
MISTAKES = {
    "no wait": ("ptx::cp_async_wait<1>();", "", emulate.InFlightError),
    "wait for too little": ("cp_async_wait<1>", "cp_async_wait<2>", emulate.InFlightError),
    "no barrier": ("__syncthreads();", "", FIRST_SEEN),
    "too few stages": ("% 3", "% 2", FIRST_SEEN),
    "beyond shared memory": ("turn % 3 * 64", "turn % 4 * 64", emulate.OutOfBoundsError),
    "beyond the source": ("p.x + next * 64", "p.x + next * 65", emulate.OutOfBoundsError),
    "misaligned source": ("p.x + next * 64 + t", "(const char*)(p.x + next * 64 + t) + 4", emulate.MisalignedError),
    "misaligned target": ("stages + next % 3 * 64 + t)", "stages + next % 3 * 64 + t) + 8", emulate.MisalignedError),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_bug(name: str) -> None:
    right, wrong, error = MISTAKES[name]
    assert right in PIPELINE
    with pytest.raises(error) as caught:
        pipeline(PIPELINE.replace(right, wrong))
    assert caught.value.where.line > 0


def test_copies_of_padding_do_not_read_their_source() -> None:
    # Sources of the last rows are outside of x, but not valid.
    text = PIPELINE.replace("p.x + next * 64 + t", "p.x + (t < p.valid ? next * 64 + t : 1 << 20)")
    pipeline(text, valid=50)


def test_register_without_a_value() -> None:
    text = MMA.replace("float d[4];\n", "float d[4];\n  if (p.c == nullptr)")
    _, values, positions = sparse_matrix(16, 32, torch.bfloat16)
    arguments = [a_fragment(values), b_fragment(torch.ones(32, 8).bfloat16()), metadata_fragment(positions, 0)]
    with pytest.raises(emulate.UninitialisedError, match=r"register d\[0\]"):
        emulate.run(text, "bf16_0", (1,), (32,), 0, [*arguments, torch.zeros(32, 4)])


def test_ldmatrix_of_bytes_never_written() -> None:
    text = LDMATRIX.replace("reinterpret_cast<uint4*>(shared)[lane] = p.rows[lane];", "")
    with pytest.raises(emulate.UninitialisedError):
        emulate.run(text, "load", (1,), (32,), 512, [torch.zeros(512), Output(torch.zeros(128)), 0])


def test_divergent_ldmatrix() -> None:
    text = LDMATRIX.replace("if (p.which == 0)", "if (lane < 16)")
    with pytest.raises(emulate.DivergenceError):
        emulate.run(text, "load", (1,), (32,), 512, [torch.zeros(512), Output(torch.zeros(128)), 1])
