"""Structured sparse weights: the format, which patterns to keep, packing.

`SparsityConfig` names a format, `best_mask` finds the pattern that keeps the most of a score, `pack` and `unpack` go
between a dense weight and its canonical storage.
"""

from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import PackedWeight, pack, unpack, validate
from samoyeds_compile.sparsity.solver import best_mask

__all__ = ["PackedWeight", "SparsityConfig", "best_mask", "pack", "unpack", "validate"]
