"""Packed weights of all experts, as Triton kernels take them and as CUDA kernels do: the same storage."""

from __future__ import annotations

from samoyeds_codegen.cuda.operands import Matrix
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.triton.operands import PackedSide, Side


def matrix(side: Side) -> Matrix:
    """A side for CUDA kernels.

    Raises:
        UnsupportedSpecError: its weight is dense.
    """
    if not isinstance(side, PackedSide):
        raise UnsupportedSpecError("CUDA kernels multiply packed weights")
    return Matrix(side.values, side.metadata, side.selection, side.first_block, side.bias)
