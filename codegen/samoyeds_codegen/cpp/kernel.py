"""A compiled kernel of experts, and how ops come to run it."""

from __future__ import annotations

import ctypes
import functools

from samoyeds_codegen.build import Source, compile_log, load
from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.isa import PORTABLE, Isa, runs_here, usable_isas
from samoyeds_codegen.cpp.ops import arguments_size, ops_library
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_codegen.errors import CompilationError, UnsupportedSpecError


class ExpertsKernel:
    """A compiled specification.

    Raises:
        KernelError: it cannot be compiled or loaded; the class says why.
    """

    def __init__(
        self, spec: ExpertsSpec | DenseExpertsSpec, isa: Isa | None = None, flags: tuple[str, ...] = ()
    ) -> None:
        self.spec, self.isa = spec, isa or usable_isas(spec.dtype)[0]
        if spec.dtype not in self.isa.dtypes or not runs_here(self.isa):
            raise UnsupportedSpecError(f"{self.isa.name} is not for {spec.dtype} weights on this machine")
        kind = "packed" if isinstance(spec, ExpertsSpec) else "dense"
        self._library = load(Source(f"{kind}-{self.isa.name}", emit(spec, self.isa), (*self.isa.flags, *flags)))
        self._library.samoyeds_arguments_size.restype = ctypes.c_int64
        if self._library.samoyeds_arguments_size() != arguments_size(kind):
            raise CompilationError("the kernel and its caller lay out their arguments differently")

    @property
    def log(self) -> str:
        """How it was compiled."""
        return compile_log(self._library)

    def use(self) -> None:
        """Have the ops run this kernel for its specification."""
        spec = self.spec
        pattern = (spec.n, spec.m, spec.vector, spec.group) if isinstance(spec, ExpertsSpec) else (0, 0, 0, 0)
        address = ctypes.cast(self._library.samoyeds_experts, ctypes.c_void_p)
        order = spec.strips if isinstance(spec, ExpertsSpec) else spec.by_columns
        most = -1 if spec.layouts.most is None else spec.layouts.most
        ops_library().samoyeds_add_kernel(spec.name.encode(), address, *pattern, order, spec.layouts.few, most)


@functools.lru_cache(maxsize=64)
def experts_kernel(spec: ExpertsSpec | DenseExpertsSpec) -> ExpertsKernel:
    """The kernel for the best instruction set of this machine, in use; a process loads each once.

    Raises:
        UnsupportedSpecError: weights are dense, and the machine has no vectors that these kernels know: libraries are
            faster there.
        KernelError: there is none; asked again, it is tried again.
    """
    if isinstance(spec, DenseExpertsSpec) and usable_isas(spec.dtype)[0] == PORTABLE:
        raise UnsupportedSpecError("dense kernels need AVX2 or AVX-512, which this machine lacks")
    kernel = ExpertsKernel(spec)
    kernel.use()
    return kernel
