"""Structured sparse weights: the format, which patterns to keep, packing, and pruning the experts of a model.

`SparsityConfig` names a format, `best_mask` finds the pattern that keeps the most of a score, `pack` and `unpack` go
between a dense weight and its canonical storage. `PackedTensor` is a packed weight that modules can use;
`save_sparse` and `load_sparse` write and read files of them. `sparsify_` prunes and packs the experts of a model,
`densify_` undoes the packing.
"""

from samoyeds_compile.sparsity.checkpoint import save_sparse
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.install import densify_
from samoyeds_compile.sparsity.load import load_sparse, load_sparse_
from samoyeds_compile.sparsity.pack import PackedWeight, pack, unpack, validate
from samoyeds_compile.sparsity.report import ParameterReport, SparsityReport
from samoyeds_compile.sparsity.solver import best_mask
from samoyeds_compile.sparsity.sparsify import sparsify_
from samoyeds_compile.sparsity.tensor import PackedTensor

__all__ = [
    "PackedTensor",
    "PackedWeight",
    "ParameterReport",
    "SparsityConfig",
    "SparsityReport",
    "best_mask",
    "densify_",
    "load_sparse",
    "load_sparse_",
    "pack",
    "save_sparse",
    "sparsify_",
    "unpack",
    "validate",
]
