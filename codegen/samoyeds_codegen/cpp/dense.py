"""A compiled kernel of experts with dense weights as a callable over tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp import kernel as packed
from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.isa import PORTABLE, Isa, runs_here, usable_isas
from samoyeds_codegen.cpp.spec import DenseExpertsSpec
from samoyeds_codegen.errors import CompilationError, UnsupportedSpecError


class _Matrix(ctypes.Structure):
    """``Matrix`` of ``templates/dense.h``."""

    _fields_ = (
        *((name, packed._PerExpert) for name in ("values", "bias")),
        *((name, ctypes.c_int64) for name in ("bias_step", "row_stride", "rows", "cols")),
    )


class _Arguments(ctypes.Structure):
    """``Arguments`` of ``templates/plan.h``, with matrices of the other kind."""

    _fields_ = tuple(
        (field[0], _Matrix if field[1] is packed._Matrix else field[1]) for field in packed._Arguments._fields_
    )


@dataclass(frozen=True)
class DenseMatrix:
    """A projection of all experts, and where in its tensors it lies.

    Attributes:
        values: one stack, or a matrix an expert, all with the same strides; what belongs to one output is contiguous.
        rows_dim: the dimension of outputs, -2 or -1; sums run over the other one.
        first, step: which outputs belong to the projection.
        rows: how many they are.
        bias: [E, bias columns], contiguous, in the dtype of the weights; ``first`` and ``step`` hold for it too.
    """

    values: Sequence[Tensor]
    rows_dim: int
    first: int
    step: int
    rows: int
    bias: Tensor | None = None


class DenseExpertsKernel:
    """A compiled `DenseExpertsSpec`; call it with tensors on the CPU.

    Raises:
        KernelError: it cannot be compiled or loaded; the class says why.
    """

    def __init__(self, spec: DenseExpertsSpec, isa: Isa | None = None, flags: tuple[str, ...] = ()) -> None:
        self.spec, self.isa = spec, isa or usable_isas(spec.dtype)[0]
        if spec.dtype not in self.isa.dtypes or not runs_here(self.isa):
            raise UnsupportedSpecError(f"{self.isa.name} is not for {spec.dtype} weights on this machine")
        library = load(Source(f"dense-{self.isa.name}", emit(spec, self.isa), (*self.isa.flags, *flags)))
        library.samoyeds_arguments_size.restype = ctypes.c_int64
        if library.samoyeds_arguments_size() != ctypes.sizeof(_Arguments):
            raise CompilationError("the kernel and its caller lay out their arguments differently")
        self._run = library.samoyeds_experts
        self._run.restype, self._run.argtypes = ctypes.c_int64, (ctypes.POINTER(_Arguments),)

    def __call__(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate: DenseMatrix | None, up: DenseMatrix,
        down: DenseMatrix, experts: int, out_TH: Tensor,
    ) -> Tensor:  # fmt: skip
        """Compute the block into ``out_TH``, contiguous, float32 or bfloat16, and return it.

        Args:
            x_TH: rows in the dtype of the weights, any strides.
            ids_TK: integers; what is not in ``0 .. experts - 1`` contributes nothing.
            weights_TK: routing weights.
            gate, up, down: the projections; a gate if and only if the specification has one.
            experts: E.
            out_TH: written, no matter what it held.

        Raises:
            MemoryError: there is not enough memory for the activations.
        """
        x_TH = x_TH if x_TH.stride(-1) == 1 else x_TH.contiguous()
        ids_TK = packed._as(ids_TK, torch.int64, torch.int32)
        weights_TK = packed._as(weights_TK, torch.float32, torch.bfloat16)
        tables: list[object] = []  # what ctypes would release while the kernel runs
        projections = [_matrix(p, tables) for p in (gate or up, up, down)]
        arguments = _Arguments(
            x_TH.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr(), out_TH.data_ptr(), x_TH.stride(0),
            *ids_TK.shape, experts, x_TH.shape[1], ids_TK.dtype == torch.int64, weights_TK.dtype == torch.bfloat16,
            out_TH.dtype == torch.bfloat16, torch.get_num_threads(), *projections,
        )  # fmt: skip
        if self._run(ctypes.byref(arguments)):
            raise MemoryError(f"experts of {x_TH.shape[0]} tokens need more memory than there is")
        return out_TH


@functools.lru_cache(maxsize=64)
def dense_experts_kernel(spec: DenseExpertsSpec) -> DenseExpertsKernel:
    """The kernel for the best instruction set of this machine; a process loads each once.

    Raises:
        UnsupportedSpecError: the machine has no vectors that these kernels know: libraries are faster there.
        KernelError: there is none; asked again, it is tried again.
    """
    if usable_isas(spec.dtype)[0] == PORTABLE:
        raise UnsupportedSpecError("dense kernels need AVX2 or AVX-512, which this machine lacks")
    return DenseExpertsKernel(spec)


def _matrix(p: DenseMatrix, tables: list[object]) -> _Matrix:
    one = p.values[0]
    stride, cols, size = one.stride(p.rows_dim), one.shape[-3 - p.rows_dim], one.element_size()
    skipped = p.first * stride * size
    if one.dim() == 3:
        values = packed._PerExpert(one.data_ptr() + skipped, one.stride(0), None)
    else:
        table = (ctypes.c_void_p * len(p.values))(*(t.data_ptr() + skipped for t in p.values))
        tables.append(table)
        values = packed._PerExpert(None, 0, ctypes.addressof(table))
    bias = packed._PerExpert() if p.bias is None else packed._PerExpert(
        p.bias.data_ptr() + p.first * size, p.bias.shape[1], None
    )  # fmt: skip
    return _Matrix(values, bias, p.step, p.step * stride, p.rows, cols)
