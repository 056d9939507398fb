"""Weights of random patterns in canonical storage, made by the packer that checkpoints come from."""

import torch

from samoyeds_codegen.cuda.operands import Matrix
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_compile.sparsity import SparsityConfig
from samoyeds_compile.sparsity.pack import PackedWeight, pack
from samoyeds_compile.sparsity.solver import best_mask

PATTERNS = [
    Pattern(1, 1, 32), Pattern(1, 2, 128), Pattern(1, 2, 32), Pattern(2, 4, 64), Pattern(1, 2, 64, 16),
    Pattern(1, 2, 32, 64),
]  # fmt: skip


def config(pattern: Pattern) -> SparsityConfig:
    return SparsityConfig(pattern.n, pattern.m, pattern.vector, group=pattern.group)


def random_weight(pattern, experts, rows, columns, dtype=torch.bfloat16, seed=0) -> tuple[torch.Tensor, PackedWeight]:
    """Dense [E, rows, columns] with the pattern, and the same packed."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=generator).to(dtype)
    dense = weight * best_mask(weight.float().abs(), config(pattern))
    return dense, pack(dense, config(pattern))


def matrix(packed: PackedWeight, bias: torch.Tensor | None = None) -> Matrix:
    assert packed.metadata is not None
    return Matrix(packed.values, packed.metadata, packed.selection, 0, bias)
