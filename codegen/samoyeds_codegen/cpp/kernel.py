"""A compiled kernel of experts as a callable over tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.isa import Isa, runs_here, usable_isas
from samoyeds_codegen.cpp.spec import ExpertsSpec
from samoyeds_codegen.errors import CompilationError, UnsupportedSpecError


class _PerExpert(ctypes.Structure):
    """``PerExpert`` of ``templates/prelude.h``."""

    _fields_ = (("base", ctypes.c_void_p), ("stride", ctypes.c_int64), ("table", ctypes.c_void_p))


class _Matrix(ctypes.Structure):
    """``Matrix`` of ``templates/prelude.h``."""

    _fields_ = (
        *((name, _PerExpert) for name in ("values", "metadata", "selection", "bias")),
        *((name, ctypes.c_int64) for name in ("bias_step", "first", "rows", "cols")),
    )


class _Arguments(ctypes.Structure):
    """``Arguments`` of ``templates/plan.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "weights", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "tokens", "top_k", "experts", "hidden")),
        *((name, ctypes.c_int64) for name in ("ids_are_int64", "weights_are_bf16", "out_is_bf16", "threads")),
        *((name, _Matrix) for name in ("gate", "up", "down")),
    )


@dataclass(frozen=True)
class PackedMatrix:
    """A packed projection of all experts in canonical storage, contiguous, and where in it the projection lies.

    Attributes:
        values, metadata, selection: one stack [E, ...] each, or a tensor an expert; no ``selection`` where n is m.
        first: output row of the dense matrix with which the projection begins, a multiple of m.
        rows: output rows of it.
        bias: [E, bias columns], contiguous, in the dtype of the weights.
        bias_first, bias_step: which columns of the bias belong to the rows.
    """

    values: Sequence[Tensor]
    metadata: Sequence[Tensor]
    selection: Sequence[Tensor]
    first: int
    rows: int
    bias: Tensor | None = None
    bias_first: int = 0
    bias_step: int = 1


class ExpertsKernel:
    """A compiled `ExpertsSpec`; call it with tensors on the CPU.

    Raises:
        KernelError: it cannot be compiled or loaded; the class says why.
    """

    def __init__(self, spec: ExpertsSpec, isa: Isa | None = None, flags: tuple[str, ...] = ()) -> None:
        self.spec, self.isa = spec, isa or usable_isas(spec.dtype)[0]
        if spec.dtype not in self.isa.dtypes or not runs_here(self.isa):
            raise UnsupportedSpecError(f"{self.isa.name} is not for {spec.dtype} weights on this machine")
        library = load(Source(f"experts-{self.isa.name}", emit(spec, self.isa), (*self.isa.flags, *flags)))
        library.samoyeds_arguments_size.restype = ctypes.c_int64
        if library.samoyeds_arguments_size() != ctypes.sizeof(_Arguments):
            raise CompilationError("the kernel and its caller lay out their arguments differently")
        self._run = library.samoyeds_experts
        self._run.restype, self._run.argtypes = ctypes.c_int64, (ctypes.POINTER(_Arguments),)

    def __call__(
        self, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate: PackedMatrix | None, up: PackedMatrix,
        down: PackedMatrix, experts: int, out_TH: Tensor,
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
        ids_TK, weights_TK = _as(ids_TK, torch.int64, torch.int32), _as(weights_TK, torch.float32, torch.bfloat16)
        tables: list[object] = []  # what ctypes would release while the kernel runs
        projections = [self._matrix(p, tables) for p in (gate or up, up, down)]
        arguments = _Arguments(
            x_TH.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr(), out_TH.data_ptr(), x_TH.stride(0),
            *ids_TK.shape, experts, x_TH.shape[1], ids_TK.dtype == torch.int64, weights_TK.dtype == torch.bfloat16,
            out_TH.dtype == torch.bfloat16, torch.get_num_threads(), *projections,
        )  # fmt: skip
        if self._run(ctypes.byref(arguments)):
            raise MemoryError(f"experts of {x_TH.shape[0]} tokens need more memory than there is")
        return out_TH

    def _matrix(self, p: PackedMatrix, tables: list[object]) -> _Matrix:
        cols = p.values[0].shape[-1] * 2
        bias = _PerExpert() if p.bias is None else _PerExpert(
            p.bias.data_ptr() + p.bias_first * p.bias.element_size(), p.bias.shape[1], None
        )  # fmt: skip
        parts = (_per_expert(tensors, tables) for tensors in (p.values, p.metadata, p.selection))
        return _Matrix(*parts, bias, p.bias_step, p.first, p.rows, cols)


@functools.lru_cache(maxsize=64)
def experts_kernel(spec: ExpertsSpec) -> ExpertsKernel:
    """The kernel for the best instruction set of this machine; a process loads each once.

    Raises:
        KernelError: there is none; asked again, it is tried again.
    """
    return ExpertsKernel(spec)


def _as(tensor: Tensor, default: torch.dtype, other: torch.dtype) -> Tensor:
    """Contiguous, in one of two dtypes."""
    return (tensor if tensor.dtype == other else tensor.to(default)).contiguous()


def _per_expert(tensors: Sequence[Tensor], tables: list[object]) -> _PerExpert:
    if not tensors:
        return _PerExpert()
    first = tensors[0]
    if first.dim() == 3:
        return _PerExpert(first.data_ptr(), first.shape[1] * first.shape[2], None)
    table = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    tables.append(table)
    return _PerExpert(None, 0, ctypes.addressof(table))
