"""One point: a shape, a dtype, some threads and tokens; all arms in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.arms import BEST, EAGER, INDUCTOR, PREFIX, Compiled
from benchmarks.cpu.products import LIBRARIES
from benchmarks.cpu.roofline import Roofline
from benchmarks.cpu.shapes import routing
from benchmarks.cpu.timing import Timing, measure

Row = dict[str, Any]
KEYS = ("shape", "dtype", "threads", "tokens")


def measure_point(
    compiled: Compiled, x: Tensor, expected: Mapping[str, Tensor], dtype: str, roofline: Roofline, seconds: float,
    flush: Callable[[], None],
) -> Row:  # fmt: skip
    """Everything but the names of the point.

    Args:
        compiled: the arms.
        x: tokens, [1, T, H].
        expected: what eager gives with the weights of each pattern.
        dtype, roofline: whose peak counts.
        seconds: for the rounds.
        flush: called before each call.
    """
    ids_TK = routing(compiled.blocks.dense, x)
    arms = compiled.arms(x, ids_TK)
    deviation = {p: _deviation(compiled.calls[PREFIX + p](x), expected[p]) for p in compiled.reports}
    timing = measure(arms, roofline.threads, seconds, flush)
    best = min(compiled.libraries, key=timing.median, default=None)
    return {
        "tokens_per_expert": round(ids_TK.numel() / len(ids_TK.unique()), 1),
        "rounds": timing.summary(),
        "ms": {arm: _digits(timing.median(arm)) for arm in arms},
        "ms_least": {arm: _digits(timing.least(arm)) for arm in arms},
        BEST: best,
        "ratio": {arm: _ratios(timing, arm, compiled, best) for arm in arms if arm.startswith(PREFIX)},
        "rate": {arm: _rates(compiled, arm, x, ids_TK, timing.median(arm), dtype, roofline) for arm in arms},
        "deviation": deviation,
        "kernel": compiled.kernels(),
        "skipped": compiled.skipped,
    }  # fmt: skip


def _ratios(timing: Timing, arm: str, compiled: Compiled, best: str | None) -> dict[str, float]:
    """The peers' times by that of an arm."""
    named = {name: name for name in (EAGER, INDUCTOR) if name in compiled.calls}
    named |= {name: name for name in LIBRARIES if name in compiled.libraries}
    if best is not None:
        named[BEST] = best
    return {name: round(timing.ratio(peer, arm), 2) for name, peer in named.items()}


def _rates(
    compiled: Compiled, arm: str, x: Tensor, ids_TK: Tensor, ms: float, dtype: str, roofline: Roofline
) -> dict[str, float]:
    """GB/s that are read, GF/s of kept weights and as if they were dense, and the share of the roofline's time."""
    size = compiled.sizes(arm, x, ids_TK)
    return {
        "GB/s": _digits(size.bytes / ms / 1e6), "GF/s": _digits(size.flops / ms / 1e6),
        "dense GF/s": _digits(size.dense_flops / ms / 1e6),
        "roofline": _digits(roofline.milliseconds(size.bytes, size.flops, dtype) / ms),
    }  # fmt: skip


def _deviation(actual: Tensor, expected: Tensor) -> float:
    """The largest difference by the largest value; 0 for both empty."""
    difference = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    return _digits(float(difference), 2)


def _digits(value: float, count: int = 4) -> float:
    return float(f"{value:.{count}g}")


def inputs_of(hidden: int, tokens: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The same for every shape and run."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, count, hidden, generator=generator).to(dtype) for count in tokens]
