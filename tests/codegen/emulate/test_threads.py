"""Plain kernels: threads, shuffles, barriers, atomics; and what is wrong with kernels that misuse them."""

import ctypes

import pytest
import torch

from samoyeds_codegen import emulate
from samoyeds_codegen.emulate import Output
from samoyeds_codegen.errors import CompilationError

SEEDS = (0, 1, 2)

ADD = """
struct P { const float* a; const float* b; float* c; int n; };
extern "C" __global__ void __launch_bounds__(64) add(const __grid_constant__ P p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.c[i] = p.a[i] + p.b[i];
}
"""

SUM = """
struct P { const float* x; float* out; int n; };
__global__ void sum(const P p) {
  __shared__ float parts[4];
  float x = 0;
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) x += p.x[i];
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) *p.out = parts[0] + parts[1] + parts[2] + parts[3];
}
"""

REVERSE = """
struct P { const int* x; int* out; };
__global__ void reverse(P p) {
  SAMOYEDS_SHARED(shared);
  int* rows = reinterpret_cast<int*>(shared);
  rows[threadIdx.x] = p.x[blockIdx.x * 96 + threadIdx.x];
  __syncthreads();
  p.out[blockIdx.x * 96 + threadIdx.x] = rows[95 - threadIdx.x];
}
"""


def reverse(text: str = REVERSE, seed: int = 0, shared_bytes: int = 96 * 4) -> tuple[torch.Tensor, torch.Tensor]:
    x, out = torch.arange(4 * 96, dtype=torch.int32), torch.zeros(4 * 96, dtype=torch.int32)
    emulate.run(text, "reverse", (4,), (96,), shared_bytes, [x, Output(out)], seed=seed)
    return x, out


def one_text(bodies: dict[str, str]) -> str:
    """One kernel for all ``bodies``, of which ``p.which`` is run: the compiler is called once."""
    cases = "\n".join(f"case {i}: {{\n{body}\n}} break;" for i, body in enumerate(bodies.values()))
    return f"""struct P {{ int* x; int which; }};
__global__ void k(P p) {{
  const int t = threadIdx.x;
  switch (p.which) {{
{cases}
  }}
}}"""


def scalar(
    body: str,
    *,
    threads: int = 32,
    blocks: int = 1,
    x: torch.Tensor | None = None,
    seed: int = 0,
    bodies: dict[str, str] | None = None,
) -> torch.Tensor:
    """Run ``body`` (or the one of that name) with a buffer ``p.x`` of 64 ints, and return it."""
    x = torch.zeros(64, dtype=torch.int32) if x is None else x
    which = list(bodies).index(body) if bodies else 0
    emulate.run(one_text(bodies or {"": body}), "k", (blocks,), (threads,), 1024, [x, which], seed=seed)
    return x


@pytest.mark.parametrize("seed", SEEDS)
def test_vector_add(seed: int) -> None:
    a, b, c = torch.randn(300), torch.randn(300), torch.empty(300)
    emulate.run(ADD, "add", (5,), (64,), 0, [a, b, Output(c), 300], seed=seed)
    assert torch.equal(c, a + b)


@pytest.mark.parametrize("seed", SEEDS)
def test_reduction_by_shuffles_and_shared_memory(seed: int) -> None:
    x, out = torch.randn(1000, dtype=torch.float32), torch.empty(1)
    emulate.run(SUM, "sum", (1,), (128,), 0, [x, Output(out), 1000], seed=seed)
    assert abs(out.item() - x.double().sum().item()) < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_between_barriers(seed: int) -> None:
    x, out = reverse(seed=seed)
    assert torch.equal(out, x.view(4, 96).flip(1).flatten())


def test_shuffles_are_those_of_cuda() -> None:
    body = """
      p.x[t] = __shfl_sync(0xffffffffu, t, 5, 8);
      p.x[32 + t] = __shfl_up_sync(0xffffffffu, t, 3) + 100 * __shfl_down_sync(0xffffffffu, t, 3, 16);"""
    x = scalar(body)
    t = torch.arange(32)
    assert torch.equal(x[:32].long(), t // 8 * 8 + 5)
    up, down = torch.where(t < 3, t, t - 3), torch.where(t % 16 > 12, t, t + 3)
    assert torch.equal(x[32:].long(), up + 100 * down)


def test_votes() -> None:
    body = "p.x[t] = __ballot_sync(0xffffffffu, t % 3 == 0); p.x[32 + t] = __any_sync(0xffffffffu, t == 7);"
    x = scalar(body)
    assert (x[:32] == sum(1 << t for t in range(0, 31, 3))).all() and (x[32:] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_may_meet(seed: int) -> None:
    assert scalar("atomicAdd(p.x, t);", threads=64, blocks=3, seed=seed)[0] == 3 * sum(range(64))


def test_numbers_of_any_width() -> None:
    text = """struct P { int small; long long big; double* out; float x; };
__global__ void k(P p) { p.out[0] = p.small; p.out[1] = p.big; p.out[2] = p.x; }"""
    out = torch.empty(3, dtype=torch.float64)
    emulate.run(text, "k", (1,), (1,), 0, [-3, ctypes.c_int64(1 << 40), Output(out), 0.5])
    assert out.tolist() == [-3, 2.0**40, 0.5]


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="32 bytes, the arguments have 24"):
        emulate.run(ADD, "add", (1,), (1,), 0, [torch.ones(1), torch.ones(1), torch.ones(1)])
    with pytest.raises(ValueError, match="does not fit an int32"):
        emulate.run(ADD, "add", (1,), (1,), 0, [None, None, None, 1 << 31])


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "cluster"),
    [((1,), (1025,), 0, 1), ((3,), (32,), 0, 2), ((1,), (32,), 1 << 18, 1), ((1,), (32, 0), 0, 1)],
)
def test_launch_that_no_gpu_takes(
    grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, cluster: int
) -> None:
    with pytest.raises(ValueError, match=r"block|shared memory"):
        emulate.run(ADD, "add", grid, block, shared_bytes, [None, None, None, 0], cluster=cluster)


def test_text_that_does_not_compile() -> None:
    with pytest.raises(CompilationError, match=r"kernel:3:.*missing"):
        emulate.run("struct P { int n; };\n__global__ void k(P p) {\n  missing(p.n); }", "k", (1,), (1,), 0, [1])


def test_tensors_stay_as_they_are_after_a_failure() -> None:
    c = torch.zeros(300)
    with pytest.raises(emulate.OutOfBoundsError):
        emulate.run(ADD, "add", (5,), (64,), 0, [torch.ones(300), torch.ones(299), c, 300])
    assert not c.any()


def test_error_says_where() -> None:
    with pytest.raises(emulate.OutOfBoundsError) as caught:
        emulate.run(ADD, "add", (5,), (64,), 0, [torch.ones(300), torch.ones(299), torch.zeros(300), 300])
    where = caught.value.where
    assert (where.kernel, where.block, where.thread) == ("add", (4, 0, 0), (43, 0, 0))
    assert (where.instruction, where.line, where.address) == ("load of 4 bytes", 5, 1196)
    assert "0 bytes past the end of argument 1 of 1196 bytes" in str(caught.value)


FIRST_SEEN = (emulate.OperandError, emulate.RaceError)
BUGS = {
    "global store": ("p.x[64 + t] = 1;", emulate.OutOfBoundsError),
    "global load": ("p.x[t] = p.x[t - 1];", emulate.OutOfBoundsError),
    "null pointer": ("int* null = 0; p.x[t] = null[t];", emulate.OutOfBoundsError),
    "dynamic shared store": ("SAMOYEDS_SHARED(s); s[1024 + t] = 1;", emulate.OutOfBoundsError),
    "local array": ("int a[4] = {1, 2, 3, 4}; p.x[t] = a[t & 7];", emulate.OutOfBoundsError),
    "misaligned": ("uint4* v = (uint4*)(p.x + t); uint4 w = v[0]; w.x += 1; v[0] = w;", emulate.MisalignedError),
    "shared never written": ("SAMOYEDS_SHARED(s); p.x[t] = s[4 * t];", emulate.UninitialisedError),
    "atomic out of bounds": ("atomicAdd(p.x + 64, 1);", emulate.OutOfBoundsError),
    "global race": ("p.x[0] = t;", emulate.RaceError),
    "atomic against plain": ("if (t) atomicAdd(p.x, 1); else p.x[0] = 5;", emulate.RaceError),
    "shuffle in a branch": ("if (t < 20) p.x[t] = __shfl_xor_sync(0xffffffffu, t, 1);", emulate.DivergenceError),
    "two shuffles": (
        "if (t < 16)\np.x[t] = __shfl_xor_sync(0xffffffffu, t, 1);\nelse\np.x[t] = __shfl_xor_sync(0xffffffffu, t, 1);",
        emulate.DivergenceError,
    ),
    "mask without the thread": ("__syncwarp(t < 16 ? 0xffffu : 0xffffu);", emulate.DivergenceError),
    "shift by all bits": ("p.x[t] = 1u << (32 + p.x[t]);", emulate.OperandError),
    "division by zero": ("p.x[t] = t / p.x[t];", emulate.OperandError),
    "overflow": ("p.x[t] = (t + 0x7fffffff) * (t + 1);", emulate.OperandError),
    "float beyond integers": ("p.x[t] = int(1e10f * (t + 1));", emulate.OperandError),
    "non-coherent load": ("p.x[t] = t; ptx::load_streaming((const uint4*)p.x + t / 4);", FIRST_SEEN),
    "endless loop": ("volatile int* x = p.x; while (x[0] == 0);", emulate.DeadlockError),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug(name: str) -> None:
    with pytest.raises(BUGS[name][1]) as caught:
        scalar(name, bodies={other: body for other, (body, _) in BUGS.items()})
    assert caught.value.where.line > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_barrier(seed: int) -> None:
    with pytest.raises((emulate.RaceError, emulate.UninitialisedError)):  # whichever thread comes first
        reverse(REVERSE.replace("__syncthreads();", ""), seed)


def test_barrier_orders_readers_before_the_next_writer() -> None:
    body = """SAMOYEDS_SHARED(s); int* v = (int*)s;
      for (int i = 0; i < 3; ++i) { v[t] = i; __syncthreads(); p.x[t] += v[t ^ 63]; %s }"""
    assert (scalar(body % "__syncthreads();", threads=64) == 3).all()
    with pytest.raises(emulate.RaceError):
        scalar(body % "", threads=64)


def test_warp_barrier_orders_a_warp_and_no_more() -> None:
    body = "SAMOYEDS_SHARED(s); s[t] = 0; __syncthreads(); s[t] = t; __syncwarp(); p.x[t] = s[t ^ %d];"
    assert torch.equal(scalar(body % 1, threads=64).long(), torch.arange(64) ^ 1)
    with pytest.raises(emulate.RaceError):
        scalar(body % 32, threads=64)


def test_barrier_that_not_all_come_to() -> None:
    with pytest.raises(emulate.DeadlockError, match=r"threads 0 to 31 of block .* __syncthreads.*32 to 63 .* returned"):
        scalar("if (t < 32) __syncthreads();", threads=64)


def test_blocks_are_not_ordered() -> None:
    assert scalar("p.x[32 * blockIdx.x + t] = t;", blocks=2)[63] == 31
    with pytest.raises(emulate.RaceError, match="another block wrote it"):
        scalar("p.x[t] = t;", blocks=2)
    with pytest.raises(emulate.RaceError, match="another block reads it"):
        scalar("if (blockIdx.x == 2) p.x[t] = t; else if (p.x[t]) __syncwarp();", blocks=3)


LAST_BLOCK = """
struct P { const float* x; float* parts; int* done; float* out; };
__global__ void sum(P p) {
  __shared__ int last;
  const int t = threadIdx.x;
  p.parts[blockIdx.x * 32 + t] = p.x[blockIdx.x * 32 + t];
  __syncthreads();
  if (t == 0) {
    __threadfence();  // release
    last = atomicAdd(p.done, 1) == gridDim.x - 1;
    __threadfence();  // acquire
  }
  __syncthreads();
  float sum = 0;
  if (last) for (int i = 0; i < gridDim.x; ++i) sum += p.parts[i * 32 + t];
  if (last) p.out[t] = sum;
}
"""


def last_block(text: str, seed: int = 0) -> None:
    x, out = torch.randint(100, (5, 32)).float(), torch.empty(32)
    arguments = [x, Output(torch.empty(5, 32)), torch.zeros(1, dtype=torch.int32), Output(out)]
    emulate.run(text, "sum", (5,), (32,), 0, arguments, seed=seed)
    assert torch.equal(out, x.sum(0))


@pytest.mark.parametrize("seed", SEEDS)
def test_last_block_may_read_what_the_others_published(seed: int) -> None:
    last_block(LAST_BLOCK, seed)


@pytest.mark.parametrize(
    "needed", ["__threadfence();  // release", "__threadfence();  // acquire", "__syncthreads();\n  if"]
)
def test_last_block_needs_its_fences_and_barriers(needed: str) -> None:
    assert needed in LAST_BLOCK
    with pytest.raises(emulate.RaceError, match="another block wrote it"):
        last_block(LAST_BLOCK.replace(needed, "if" if needed.endswith("if") else ""))


def test_output_is_not_to_be_read() -> None:
    out = torch.ones(64)
    with pytest.raises(emulate.UninitialisedError):
        emulate.run(
            "struct P { float* x; }; __global__ void k(P p) { p.x[0] += 1; }", "k", (1,), (1,), 0, [Output(out)]
        )


def test_strided_tensor_has_the_bounds_of_its_elements() -> None:
    x, out = torch.arange(40.0).view(4, 10), torch.empty(1)
    text = "struct P { const float* x; float* out; int i; };\n__global__ void k(P p) { *p.out = p.x[p.i]; }"
    emulate.run(text, "k", (1,), (1,), 0, [x[:, 2:5], Output(out), 32])
    assert out.item() == 34
    with pytest.raises(emulate.OutOfBoundsError):
        emulate.run(text, "k", (1,), (1,), 0, [x[:, 2:5], Output(out), 33])


def test_tensors_that_share_memory_share_a_buffer() -> None:
    x = torch.arange(12.0)
    text = "struct P { const float* a; float* b; };\n__global__ void k(P p) { p.b[0] = p.a[5] + 1; }"
    emulate.run(text, "k", (1,), (1,), 0, [x[:8], x[4:]])
    assert x[4] == 6
    with pytest.raises(emulate.OutOfBoundsError, match="past the end of argument 0 and argument 1 of 48 bytes"):
        emulate.run(text.replace("p.a[5]", "p.a[12]"), "k", (1,), (1,), 0, [x[:8], x[4:]])


def test_address_before_a_buffer() -> None:
    with pytest.raises(emulate.OutOfBoundsError, match="address -0x4: 4 bytes before argument 0 of 256 bytes"):
        scalar("p.x[t - 1] = 1;")
