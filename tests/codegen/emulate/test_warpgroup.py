"""wgmma.sp with descriptors and swizzles against float64, and planted bugs around it."""

import pytest
import torch
from torch import Tensor

from samoyeds_codegen import emulate
from samoyeds_codegen.emulate import Output
from tests.codegen.emulate.fragments import a_fragment, metadata_fragment, sparse_matrix, warpgroup_accumulator

# One warpgroup. A [64, 16] kept values and B [N, 64] (two steps of 32 columns, the second one for another A) come from
# global memory through plain stores; `swizzle` is log2 of the 16-byte pieces in a row of the swizzle pattern.
KERNEL = """
constexpr int N = 24;
struct P { const uint4* a; const uint4* b; const uint32_t* metadata; float* c; int swizzle_a; };
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading, int stride, int layout) {
  return uint64_t(address >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(layout) << 62;
}
template <class T> __device__ __forceinline__ void multiply(const P& p) {
  SAMOYEDS_SHARED(shared);
  const int t = threadIdx.x;
  // A: step, row, piece. Without a swizzle: core matrices of 8 rows x 16 bytes.
  for (int i = t; i < 2 * 64 * 2; i += 128) {
    const int step = i / 128, row = i / 2 % 64, piece = i % 2;
    int at = row / 8 * 256 + piece * 128 + row % 8 * 16;
    if (p.swizzle_a == 1) at = row * 32 + piece * 16, at ^= (at >> 7 & 1) << 4;
    *reinterpret_cast<uint4*>(shared + step * 2048 + at) = p.a[i];
  }
  unsigned char* b = shared + 4096;
  for (int i = t; i < N * 8; i += 128)
    *reinterpret_cast<uint4*>(b + i / 8 * 128 + ((i % 8 ^ i / 8 % 8) << 4)) = p.b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2] = {};
  const int layout = p.swizzle_a ? 3 : 0;
  const uint64_t a = descriptor(ptx::shared_address(shared), 128, 256, layout);
  const uint64_t tokens = descriptor(ptx::shared_address(b), 16, 1024, 1);
  ptx::wgmma_fence();
  ptx::wgmma_sp<T, N, 0>(d, a, tokens, p.metadata[t]);
  ptx::wgmma_sp<T, N, 1>(d, a + (2048 >> 4), tokens + (64 >> 4), p.metadata[t]);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) p.c[t * N / 2 + i] = d[i];
}
__global__ void bf16(P p) { multiply<__nv_bfloat16>(p); }
__global__ void f16(P p) { multiply<__half>(p); }
"""
COLUMNS = 24


def run(text: str = KERNEL, dtype: torch.dtype = torch.bfloat16, swizzle_a: int = 0, seed: int = 0) -> None:
    parts = [sparse_matrix(64, 32, dtype, seed=step) for step in range(2)]
    b = torch.randn(COLUMNS, 64).to(dtype)
    out = torch.empty(128, COLUMNS // 2)
    a = torch.stack([values for _, values, _ in parts])
    kernel = "bf16" if dtype == torch.bfloat16 else "f16"
    arguments = [a, b, metadata_of([positions for _, _, positions in parts]), Output(out), swizzle_a]
    emulate.run(text, kernel, (1,), (128,), 4096 + 3072 + 2048, arguments, seed=seed)
    expected = sum(dense @ b[:, 32 * step : 32 * step + 32].double().T for step, (dense, _, _) in enumerate(parts))
    assert torch.allclose(warpgroup_accumulator(out).double(), expected, rtol=1e-5, atol=1e-5)


def metadata_of(positions: list[Tensor]) -> Tensor:
    """int32 [128]: selector 0 for the first step, 1 for the second, of each warp's 16 rows."""
    warps = []
    for warp in range(4):
        rows = slice(16 * warp, 16 * warp + 16)
        even, odd = (metadata_fragment(p[rows], selector) for selector, p in enumerate(positions))
        warps.append(even | odd)
    return torch.cat(warps)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("swizzle_a", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wgmma_sp(dtype: torch.dtype, swizzle_a: int, seed: int) -> None:
    run(KERNEL, dtype, swizzle_a, seed)


MISTAKES = {
    "no fence of the proxy": ("ptx::fence_proxy_async();", "", emulate.MissingFenceError),
    "fence after the barrier of the others": (
        "ptx::fence_proxy_async();\n  __syncthreads();",
        "__syncthreads();\nif (t == 0) ptx::fence_proxy_async();",
        emulate.MissingFenceError,
    ),
    "no barrier": ("__syncthreads();", "", (emulate.RaceError, emulate.UninitialisedError)),
    "no wgmma_fence": ("ptx::wgmma_fence();", "", emulate.MissingFenceError),
    "accumulator written after the fence": (
        "ptx::wgmma_fence();",
        "ptx::wgmma_fence(); d[3] = 1;",
        emulate.MissingFenceError,
    ),
    "accumulator cleared after the fence": (
        "ptx::wgmma_fence();",
        "ptx::wgmma_fence(); for (int i = 0; i < N / 2; ++i) d[i] = 0;",
        emulate.MissingFenceError,
    ),
    "no wgmma_wait": ("ptx::wgmma_wait<0>();", "", emulate.InFlightError),
    "wait for too little": ("wgmma_wait<0>", "wgmma_wait<1>", emulate.InFlightError),
    "no commit": ("ptx::wgmma_commit();", "", emulate.InFlightError),
    "operand overwritten before the wait": (
        "ptx::wgmma_wait<0>();",
        "shared[t] = 0; ptx::wgmma_wait<0>();",
        emulate.InFlightError,
    ),
    "accumulator read between products": (
        "ptx::wgmma_commit();",
        "ptx::wgmma_commit(); p.c[t * N / 2] = d[0];",
        emulate.InFlightError,
    ),
    "descriptor between rows of the swizzle": ("tokens + (64 >> 4)", "tokens + (128 >> 4)", emulate.OperandError),
    "descriptor beyond shared memory": ("a + (2048 >> 4)", "a + (16384 >> 4)", emulate.OutOfBoundsError),
    "stride beyond shared memory": ("16, 1024, 1)", "16, 8192, 1)", emulate.OutOfBoundsError),
    "descriptors differ": ("a + (2048 >> 4)", "a + (t < 64 ? 128 : 0)", emulate.OperandError),
    "not the whole warpgroup": ("ptx::wgmma_commit();", "if (t < 96) ptx::wgmma_commit();", emulate.DivergenceError),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_planted_bug(name: str) -> None:
    right, wrong, error = MISTAKES[name]
    assert right in KERNEL
    with pytest.raises(error) as caught:
        run(KERNEL.replace(right, wrong))
    assert caught.value.where.line > 0


RIGHT = {
    "all threads fence after the barrier": (
        "ptx::fence_proxy_async();\n  __syncthreads();",
        "__syncthreads();\n  ptx::fence_proxy_async();",
    ),
    "a fence for each product": (
        "ptx::wgmma_sp<T, N, 1>",
        "ptx::wgmma_commit();\n  ptx::wgmma_wait<0>();\n  ptx::wgmma_fence();\n  ptx::wgmma_sp<T, N, 1>",
    ),
    "a group for each product": ("ptx::wgmma_sp<T, N, 1>", "ptx::wgmma_commit();\n  ptx::wgmma_sp<T, N, 1>"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_other_ways_to_do_it_right(name: str) -> None:
    one, other = RIGHT[name]
    assert one in KERNEL
    run(KERNEL.replace(one, other))


def test_metadata_must_ascend() -> None:
    wrong = "p.metadata[t] & ~0xf0u);\n  ptx::wgmma_commit"
    with pytest.raises(emulate.MetadataError, match="group 1 of metadata"):
        run(KERNEL.replace("p.metadata[t]);\n  ptx::wgmma_commit", wrong))


@pytest.mark.parametrize("fence", ["", "ptx::wgmma_fence();"])
def test_product_after_a_read_needs_another_fence(fence: str) -> None:
    again = f"""ptx::wgmma_wait<0>();
  if (d[0] == 12345) p.c[t] = 0;
  {fence}
  ptx::wgmma_sp<T, N, 0>(d, zeros, tokens, p.metadata[t]);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();"""
    # A of zeros behind the rest of shared memory, so that the sum stays what it is.
    zeros = """reinterpret_cast<uint4*>(b + N * 128)[t] = make_uint4(0, 0, 0, 0);
  const uint64_t zeros = descriptor(ptx::shared_address(b + N * 128), 128, 256, 0);
  ptx::fence_proxy_async();"""
    text = KERNEL.replace("ptx::fence_proxy_async();", zeros).replace("ptx::wgmma_wait<0>();", again)
    if fence:
        run(text)
        return
    with pytest.raises(emulate.MissingFenceError, match="accumulator 0 was read or written"):
        run(text)


@pytest.mark.parametrize(("registers", "fits"), [(216, True), (217, False), (264, False)])
def test_registers(registers: int, fits: bool) -> None:
    text = KERNEL.replace("ptx::wgmma_fence();", f"ptx::registers_up<{registers}>(); ptx::wgmma_fence();")
    if fits:
        run(text)
        return
    with pytest.raises(emulate.OperandError, match=f"{registers} registers"):
        run(text)


# The same product with A in registers: `fragments` are int32 [step][thread][4].
FROM_REGISTERS = """
constexpr int N = 24;
struct P { const uint4* a; const uint4* b; const uint32_t* metadata; float* c; };
__global__ void bf16(P p) {
  SAMOYEDS_SHARED(shared);
  const int t = threadIdx.x;
  for (int i = t; i < N * 8; i += 128)
    *reinterpret_cast<uint4*>(shared + i / 8 * 128 + ((i % 8 ^ i / 8 % 8) << 4)) = p.b[i];
  ptx::fence_proxy_async();
  __syncthreads();
  float d[N / 2] = {};
  uint32_t a[2][4];
  for (int step = 0; step < 2; ++step) {
    const uint4 mine = p.a[step * 128 + t];
    a[step][0] = mine.x, a[step][1] = mine.y, a[step][2] = mine.z, a[step][3] = mine.w;
  }
  const uint64_t tokens = uint64_t(ptx::shared_address(shared) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
  ptx::wgmma_fence();
  ptx::wgmma_sp_registers<__nv_bfloat16, N, 0>(d, a[0], tokens, p.metadata[t]);
  ptx::wgmma_sp_registers<__nv_bfloat16, N, 1>(d, a[1], tokens + (64 >> 4), p.metadata[t]);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) p.c[t * N / 2 + i] = d[i];
}
"""


def run_from_registers(text: str = FROM_REGISTERS, seed: int = 0) -> float:
    """The largest difference from float64."""
    parts = [sparse_matrix(64, 32, torch.bfloat16, seed=step) for step in range(2)]
    b, out = torch.randn(COLUMNS, 64).bfloat16(), torch.empty(128, COLUMNS // 2)
    warps = [[a_fragment(values[16 * w : 16 * w + 16]) for w in range(4)] for _, values, _ in parts]
    fragments = torch.stack([torch.cat(of_step) for of_step in warps])
    arguments = [fragments, b, metadata_of([positions for _, _, positions in parts]), Output(out)]
    emulate.run(text, "bf16", (1,), (128,), 3072, arguments, seed=seed)
    expected = sum(dense @ b[:, 32 * step : 32 * step + 32].double().T for step, (dense, _, _) in enumerate(parts))
    return float((warpgroup_accumulator(out).double() - expected).abs().max())


@pytest.mark.parametrize("seed", [0, 1])
def test_first_operand_in_registers(seed: int) -> None:
    assert run_from_registers(seed=seed) < 1e-4


@pytest.mark.parametrize(
    ("right", "wrong", "error"),
    [
        ("  ptx::wgmma_fence();", "  ptx::wgmma_fence(); a[1][2] = 0;", emulate.MissingFenceError),
        ("  ptx::wgmma_fence();", "", emulate.MissingFenceError),
        ("  ptx::wgmma_wait<0>();", "  a[1][3] = 0; ptx::wgmma_wait<0>();", emulate.InFlightError),
        ("  uint32_t a[2][4];", "  static uint32_t a[2][4];", emulate.EmulationError),
        (", a[step][3] = mine.w;", ";", emulate.UninitialisedError),
    ],
)
def test_misuse_of_registers(right: str, wrong: str, error: type[Exception]) -> None:
    assert FROM_REGISTERS.count(right) == 1
    with pytest.raises(error):
        run_from_registers(FROM_REGISTERS.replace(right, wrong))


def test_registers_of_another_step() -> None:
    assert run_from_registers(FROM_REGISTERS.replace("d, a[1]", "d, a[0]")) > 0.5
