"""Packed weights of all experts, as Triton kernels take them and as CUDA kernels do: the same storage."""

from __future__ import annotations

from torch import Tensor

from samoyeds_codegen.cuda.operands import Matrix
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.triton.matrices import Matrices
from samoyeds_codegen.triton.operands import PackedSide, Side, Stack


def matrix(side: Side) -> Matrix:
    """A side for CUDA kernels.

    Raises:
        UnsupportedSpecError: its weight is dense.
    """
    if not isinstance(side, PackedSide):
        raise UnsupportedSpecError("CUDA kernels multiply packed weights")
    if isinstance(side.values, Matrices):
        raise UnsupportedSpecError("CUDA kernels read stacks")
    selection = None if side.selection is None else _rows(side.selection)
    return Matrix(_rows(side.values), _rows(side.metadata), selection, side.first_block, side.bias)


def _rows(tensor: Stack) -> Tensor:
    """The tensor with rows of an expert one after the other; itself, but for views of part of each row."""
    assert isinstance(tensor, Tensor)  # with the values, all are
    return tensor if tensor.stride()[1:] == (tensor.shape[2], 1) else tensor.contiguous()
