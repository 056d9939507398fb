"""Threads of the ops in C++: how many, in whose pool, and that nothing depends on them."""

import ctypes
import threading

import pytest
import torch

from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_codegen.cpp.ops import has_ops_library, ops_library
from samoyeds_compile.sparsity import SparsityConfig
from tests.ops.operands import ACTIVATIONS, operands
from tests.ops.test_sparse_experts import error, expected_of, kernel_of, packed_operands, run

pytestmark = pytest.mark.skipif(not has_ops_library(), reason="needs a C++ compiler")
MUCH = 1 << 40
INSIDE = """
#include <omp.h>
extern "C" void inside(void (*f)()) {
#pragma omp parallel num_threads(2)
#pragma omp master
  f();
}
"""


@pytest.fixture
def restore():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inside_a_region(f) -> None:
    """Call ``f`` from a thread of a pool that is at work."""
    load(Source("inside", INSIDE)).inside(ctypes.CFUNCTYPE(None)(f))


def test_how_many(restore) -> None:
    """Torch's number for much work, one for little; one inside a region, whose threads have the cores."""
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert ops_library().samoyeds_threads(MUCH) == threads
        assert ops_library().samoyeds_threads(1) == 1
    inside_a_region(lambda: found.append(ops_library().samoyeds_threads(MUCH)))
    assert found == [1]


def case(dtype: torch.dtype, tokens: int = 400, experts: int = 61) -> tuple:
    """One hot expert and sixty with a few tokens each."""
    config = SparsityConfig(1, 2, 32)
    args = operands(1, tokens, 2, experts, 96, 160, "concatenated", "out_in", False, dtype, sentinels=False)
    args[1][:, 0] = 7
    args[1][:, 1] = torch.arange(tokens) % experts
    args[1][args[1][:, 1] == 7, 1] = 8
    dense, packed = packed_operands(args, config)
    name = str(dtype).removeprefix("torch.")
    return kernel_of(usable_isas(name)[0], name, config, ACTIVATIONS["concatenated"], True), packed, expected_of(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_uneven_experts(dtype: torch.dtype, restore) -> None:
    """The same bits for any number of threads, in each of several runs, and inside another pool's region."""
    kernel, packed, expected = case(dtype)
    results = []
    for threads in (1, 2, 3, 8, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(kernel, packed))
    inside_a_region(lambda: results.append(run(kernel, packed)))
    assert len(results) == 7 and all(torch.equal(results[0], other) for other in results[1:])
    assert error(results[0], expected) <= (1e-6 if dtype == torch.float32 else 5e-3)


def test_called_from_several_threads(restore) -> None:
    """Python releases its lock in the op, so calls really overlap; nothing is shared between them but weights."""
    kernel, packed, _ = case(torch.float32)
    torch.set_num_threads(2)
    logits = torch.randn(300, 64).round()
    expected = run(kernel, packed), torch.topk(logits, 6)[1]
    wrong: list[object] = []

    def work() -> None:
        words = "softmax topk_then_score 6 True choice none 0.0 None 1 1 max True 0.0 None None"
        for _ in range(20):
            got = run(kernel, packed), torch.ops.samoyeds.choose_experts(logits, None, words)[1]
            wrong.extend(g for g, e in zip(got, expected, strict=True) if not torch.equal(g, e))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
