"""Structured sparse weights: the format, which patterns to keep, packing, and pruning the experts of a model.

`SparsityConfig` names a format, `best_mask` finds the pattern that keeps the most of a score, `pack` and `unpack` go
between a dense weight and its canonical storage. `sparsify_` does all of it to a model, `densify_` undoes the packing.
"""

from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.install import densify_
from samoyeds_compile.sparsity.pack import PackedWeight, pack, unpack, validate
from samoyeds_compile.sparsity.report import ParameterReport, SparsityReport
from samoyeds_compile.sparsity.solver import best_mask
from samoyeds_compile.sparsity.sparsify import sparsify_

__all__ = [
    "PackedWeight",
    "ParameterReport",
    "SparsityConfig",
    "SparsityReport",
    "best_mask",
    "densify_",
    "pack",
    "sparsify_",
    "unpack",
    "validate",
]
