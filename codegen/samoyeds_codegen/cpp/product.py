"""Compiled products of all experts, one by one, as training computes them, and how they are called."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from samoyeds_codegen.build import Source, compile_log, load
from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.isa import PORTABLE, Isa, runs_here, usable_isas
from samoyeds_codegen.cpp.ops import ops_library
from samoyeds_codegen.cpp.spec import ProductSpec
from samoyeds_codegen.errors import CompilationError, KernelError, UnsupportedSpecError

_FIELDS = {"linear": 17, "outer": 14}
"""Of a call; each takes eight bytes."""
_ALL = (("linear", False), ("linear", True), ("outer", True))
"""Products, and whether weights are read by columns."""


@dataclass(frozen=True)
class Runs:
    """Which rows each expert has.

    Attributes:
        ends_E: int32, contiguous; end of each expert's run of slots.
        order_S: int64, contiguous; slot s has token ``order[s] // top_k``. None: row s.
        top_k: see there.
    """

    ends_E: Tensor
    order_S: Tensor | None = None
    top_k: int = 1

    @property
    def fields(self) -> list[int]:
        """As a call has them."""
        order = 0 if self.order_S is None else self.order_S.data_ptr()
        return [self.ends_E.data_ptr(), order, self.ends_E.shape[0], max(self.top_k, 1)]


class ProductKernel:
    """A compiled specification.

    Raises:
        KernelError: it cannot be compiled or loaded; the class says why.
    """

    def __init__(self, spec: ProductSpec, isa: Isa | None = None, flags: tuple[str, ...] = ()) -> None:
        self.spec, self.isa = spec, isa or usable_isas(spec.dtype)[0]
        if spec.dtype not in self.isa.dtypes or not runs_here(self.isa):
            raise UnsupportedSpecError(f"{self.isa.name} is not for {spec.dtype} weights on this machine")
        self._library = load(Source(f"{spec.product}-{self.isa.name}", emit(spec, self.isa), (*self.isa.flags, *flags)))
        self._library.samoyeds_call_size.restype = self._library.samoyeds_product.restype = ctypes.c_int64
        if self._library.samoyeds_call_size() != 8 * _FIELDS[spec.product]:
            raise CompilationError("the kernel and its caller lay out their arguments differently")

    @property
    def log(self) -> str:
        """How it was compiled."""
        return compile_log(self._library)

    def linear(self, x: Tensor, runs: Runs, weights: Sequence[Tensor], in_out: bool, out_SO: Tensor) -> None:
        """Write ``W[e] x[row]`` of every slot into ``out``.

        Args:
            x: contiguous rows, any stride between them.
            runs: of the experts.
            weights: one stack [E, O, I] or E matrices alike, [O, I], the last two dimensions swapped if ``in_out``;
                weights of one input, or of one output, are contiguous, as ``by_columns`` says.
            in_out: see there.
            out_SO: contiguous; rows after the last run become zero.
        """
        first = weights[0]
        stacked = first.dim() == 3
        table = (ctypes.c_void_p * len(weights))(*[w.data_ptr() for w in weights])
        where = [first.data_ptr(), first.stride(0), 0] if stacked else [0, 0, ctypes.addressof(table)]
        sides = [(first.stride(-2), first.shape[-2]), (first.stride(-1), first.shape[-1])]
        (row_stride, rows), (col_stride, cols) = reversed(sides) if in_out else sides
        matrix = [*where, row_stride, col_stride, rows, cols]
        few, threads = self.spec.layouts.few, _threads(out_SO.shape[0] * rows * cols)
        self._run(x.data_ptr(), x.stride(0), *runs.fields, *matrix, out_SO.data_ptr(), out_SO.shape[0], few, threads)

    def outer(self, left: Tensor, right: Tensor, of_tokens: Sequence[bool], runs: Runs, out_ELR: Tensor) -> None:
        """Write the sum of ``outer(left[s], right[s])`` over the slots of each expert into ``out``.

        Args:
            left, right: contiguous rows, of slots or of tokens.
            of_tokens: for either whether its rows are tokens.
            runs: of the experts.
            out_ELR: contiguous; zero for an expert without slots.
        """
        sides: list[int] = []
        for side, token in zip((left, right), of_tokens, strict=True):
            sides += side.data_ptr(), side.stride(0), side.shape[1], token
        slots = runs.order_S.shape[0] if runs.order_S is not None else left.shape[0]
        work = max(slots * left.shape[1] * right.shape[1], out_ELR.numel())
        self._run(*sides, *runs.fields, out_ELR.data_ptr(), _threads(work))

    def _run(self, *fields: int) -> None:
        call = (ctypes.c_int64 * len(fields))(*fields)
        if self._library.samoyeds_product(call):
            raise MemoryError(f"samoyeds: no memory for a product ({self.spec})")


def _threads(work: int) -> int:
    return int(ops_library().samoyeds_threads(work))


@functools.lru_cache(maxsize=16)
def product_kernel(spec: ProductSpec) -> ProductKernel:
    """The kernel for the best instruction set of this machine; a process loads each once.

    Raises:
        UnsupportedSpecError: the machine has no vectors that these kernels know: libraries are faster there.
        KernelError: there is none; asked again, it is tried again.
    """
    if usable_isas(spec.dtype)[0] == PORTABLE:
        raise UnsupportedSpecError("dense kernels need AVX2 or AVX-512, which this machine lacks")
    ops_library()  # counts threads in each call
    return ProductKernel(spec)


def product_kernels(dtype: str) -> list[ProductKernel]:
    """All products of a dtype, compiled at the same time; empty where some have no kernel."""
    try:
        specs = [ProductSpec(dtype, product, by_columns) for product, by_columns in _ALL]
        with ThreadPoolExecutor(len(specs)) as pool:
            return list(pool.map(product_kernel, specs))
    except KernelError:
        return []
