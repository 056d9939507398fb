"""Measures the constants of `machine.Machine` on this machine, with the kernels themselves.

Each kernel is run on one block whose experts have equally many tokens, once with all of them token-major and once with
all of them in tiles; which of the two it takes is a number of the call, so nothing is compiled for it. Caches are
flushed before each run: the weights of a block are read once for all of its tokens, and other layers come in between.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_codegen.cpp.kernel import experts_kernel
from samoyeds_codegen.cpp.layouts import MOST, Layouts
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.layout.cold import Flush
from samoyeds_compile.layout.machine import KINDS, Machine, defaults
from samoyeds_compile.layout.rates import Kernel, Rates

EXPERTS, HIDDEN, WIDTH = 8, 1024, 1024
"""E, H, I: weights of all experts are several times what the second cache holds."""
WEIGHTS = EXPERTS * 3 * HIDDEN * WIDTH
ACTIVATION = "silu(gate) * up"
ALL = MOST
"""Keeps rows at any number of tokens."""
REPEATS = 5
ROWS, TILES, LIBRARY = (8, 16, 24), (16, 32, 48), (8, 24, 48)
"""Tokens of an expert at which either kernel, and PyTorch's products, are measured beside one token."""

Run = Callable[..., object]
"""Computes the block with so many tokens an expert, token-major where it has at most so many."""


def calibrate(kinds: tuple[str, ...] = KINDS, tell: Callable[[str], None] = lambda kind: None) -> Machine:
    """Measure; kinds without a kernel here keep their defaults.

    Args:
        kinds: which kernels.
        tell: called with the name of each before it is measured.
    """
    known, library, flush = defaults(), dict(defaults().library), Flush()
    kernels = dict(known.kernels)
    with torch.no_grad():
        for name in kinds:
            tell(name)
            if (run := runner(name)) is not None:
                kernels[name] = Kernel(
                    _rates(partial(run, few=ALL), flush, ROWS),
                    _rates(partial(run, few=0), flush, TILES, _lanes(name)),
                )
            if name.endswith("columns"):
                library[name.split()[0]] = _rates(_library(name), flush, LIBRARY)
        move, turn = _moves(flush)
        return replace(known, kernels=kernels, library=library, move=move, turn=turn, origin="measured")


def runner(name: str) -> Run | None:
    """The block of a kind (`machine.kind`); None if there is no kernel for it here."""
    spec = spec_of(name)
    try:
        experts_kernel(spec)
    except KernelError:
        return None
    tensors, more = _dense(spec) if isinstance(spec, DenseExpertsSpec) else _packed(spec)
    op = torch.ops.samoyeds.dense_experts if isinstance(spec, DenseExpertsSpec) else torch.ops.samoyeds.sparse_experts
    dtype = getattr(torch, spec.dtype)

    def run(tokens: int, few: int) -> object:
        chosen = replace(spec, layouts=Layouts.up_to(few))
        experts_kernel(chosen)
        return op(*_tokens(tokens, dtype), *tensors, None, None, None, chosen.name, *more, dtype)

    return run


def spec_of(name: str) -> DenseExpertsSpec | ExpertsSpec:
    """A specification of a kind."""
    dtype, form, *order = name.split()
    if form in ("dense", "columns"):
        return DenseExpertsSpec(dtype, ACTIVATION, True, form == "columns")
    pattern, _, group = form.partition("/")
    n, m = map(int, pattern.split(":"))
    return ExpertsSpec(dtype, n, m, 32, int(group or 1), ACTIVATION, True, order == ["strips"])


def _lanes(name: str) -> int:
    """Tokens in multiples of which tiles are computed; strips on the matrix unit take as many as there are."""
    any_number = name.endswith("strips") and usable_isas(name.split()[0])[0].many == "amx"
    return 1 if any_number else 16


def _tokens(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [E * tokens, H], each at one expert, and equally many at each."""
    ids_TK = torch.arange(EXPERTS).repeat(tokens).unsqueeze(1)
    return torch.ones(EXPERTS * tokens, HIDDEN, dtype=dtype), ids_TK, torch.ones(len(ids_TK), 1)


def _dense(spec: DenseExpertsSpec) -> tuple[tuple[list[Tensor], ...], tuple[str, str]]:
    dtype = getattr(torch, spec.dtype)
    up, down = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
    if spec.by_columns:
        up, down = up[::-1], down[::-1]
    weights = [torch.full((EXPERTS, *shape), 0.01, dtype=dtype) for shape in (up, down)]
    return ([], weights[:1], weights[1:]), ("concatenated", "in_out" if spec.by_columns else "out_in")


def _packed(spec: ExpertsSpec) -> tuple[tuple[list[Tensor], ...], tuple[int, str]]:
    return ([], _storage(spec, 2 * WIDTH, HIDDEN), _storage(spec, HIDDEN, WIDTH)), (WIDTH, "concatenated")


def _storage(spec: ExpertsSpec, rows: int, cols: int) -> list[Tensor]:
    """Canonical storage that keeps the first two columns of four, and the first sub-rows."""
    condensed = rows * spec.n // spec.m
    values = torch.full((EXPERTS, condensed, cols // 2), 0.01, dtype=getattr(torch, spec.dtype))
    metadata = torch.full((EXPERTS, condensed, cols // 16), 0x4444, dtype=torch.int16)
    several = spec.strips and spec.group == 1  # then rows are side by side, else one after the other
    chosen = torch.arange(condensed // spec.group) % spec.n * (spec.m // spec.n)
    shape = (EXPERTS, condensed // spec.group, cols // spec.vector)
    flat = chosen.repeat(shape[2]) if several else chosen.repeat_interleave(shape[2])
    selection = flat.to(torch.uint8).repeat(EXPERTS).view(shape)
    return [values, metadata, *([selection] if spec.n < spec.m else [])]


def _library(name: str) -> Callable[[int], object]:
    """PyTorch's products of the same block."""
    spec = spec_of(name)
    assert isinstance(spec, DenseExpertsSpec)
    tensors, more = _dense(spec)
    dtype = getattr(torch, spec.dtype)
    block = torch.ops.samoyeds.moe_experts
    return lambda n: block(*_tokens(n, dtype), *tensors, None, None, None, ACTIVATION, *more, "output", dtype, None)


def _rates(run: Callable[[int], object], flush: Flush, points: tuple[int, ...], lanes: int = 1) -> Rates:
    """Of what takes so long for so many tokens: the least that it takes, and a line through these numbers of tokens."""
    one, *times = (seconds(lambda n=n: run(n), flush) * 1e12 / WEIGHTS for n in (1, *points))  # type: ignore[misc]
    mac, step = np.polyfit(points, times, 1)
    return Rates(round(min(one, *times), 1), round(max(step, 0.0), 1), round(max(mac, 0.01), 2), lanes)


def _moves(flush: Flush) -> tuple[float, float]:
    """Picoseconds a byte: to copy rows, and to write them in the other order."""
    rows = torch.ones(2048, 2048)
    return tuple(
        round(seconds(move, flush) * 1e12 / (2 * rows.nbytes), 1)
        for move in (rows.clone, lambda: rows.t().contiguous())
    )  # type: ignore[return-value]


def seconds(run: Callable[[], object], flush: Flush) -> float:
    """The median of some runs: CPU time of the thread if there is one, else of the clock on the wall."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return statistics.median(_times(run, flush, clock))


def _times(run: Callable[[], object], flush: Flush, clock: Callable[[], float]) -> Iterator[float]:
    run()
    for _ in range(REPEATS):
        flush()
        start = clock()
        run()
        yield clock() - start
