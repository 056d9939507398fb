"""The roofline of the machine, measured: bytes a second from memory, multiplications a second in registers."""

from __future__ import annotations

import ctypes
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.timing import Usage
from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_compile.layout.cold import MIB, cache_bytes

REPEATS = 15


@dataclass(frozen=True)
class Roofline:
    """The best of some repeats; GB/s, GF/s. ``amx`` is 0 where there is no matrix unit, ``pairs`` where vectors do
    not multiply pairs of bfloat16; ``foreign`` is the share of all cores that others used."""

    threads: int
    read: float
    fma: float
    amx: float
    medians: dict[str, float]
    foreign: float
    pairs: float = 0.0

    def peak(self, dtype: str) -> float:
        """GF/s of products in a dtype: for bfloat16 those of what multiplies it, where there is such."""
        return max(self.amx, self.pairs, self.fma) if dtype == "bf16" else self.fma

    def milliseconds(self, size: int, flops: int, dtype: str) -> float:
        """The least time to read so many bytes and do so many operations."""
        return max(size / self.read, flops / self.peak(dtype)) / 1e6

    def row(self) -> dict[str, Any]:
        """For the results."""
        return {key: _round(value) for key, value in asdict(self).items()}


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(threads: int) -> Roofline:
    """Compile and run ``roofline.cpp``, a few seconds."""
    library = load(Source("roofline", Path(__file__).with_name("roofline.cpp").read_text(), ("-march=native",)))
    for function in (library.read_rate, library.fma_rate, library.amx_rate, library.pairs_rate):
        function.restype = ctypes.c_double
    has_amx = any("amx" in isa.name for isa in usable_isas("bfloat16"))  # asks the system for the unit, too
    memory = torch.ones(min(2 * cache_bytes(), 1024 * MIB) // 4)
    where, count = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
    before = Usage.now()
    rates = {
        "read": [library.read_rate(where, count, threads) for _ in range(REPEATS)],
        "fma": [library.fma_rate(threads) for _ in range(REPEATS)],
        "pairs": [library.pairs_rate(threads) for _ in range(REPEATS)],
        "amx": [library.amx_rate(threads) if has_amx else 0.0 for _ in range(REPEATS)],
    }
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = {name: max(values) for name, values in rates.items()}
    return Roofline(threads, **best, medians=medians, foreign=round(Usage.now().foreign_since(before), 3))
