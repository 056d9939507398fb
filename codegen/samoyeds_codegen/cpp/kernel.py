"""A compiled kernel of experts, and how ops come to run it."""

from __future__ import annotations

import ctypes
import functools

from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.isa import Isa, runs_here, usable_isas
from samoyeds_codegen.cpp.ops import ops_library
from samoyeds_codegen.cpp.spec import ExpertsSpec
from samoyeds_codegen.errors import CompilationError, UnsupportedSpecError


class ExpertsKernel:
    """A compiled `ExpertsSpec`.

    Raises:
        KernelError: it cannot be compiled or loaded; the class says why.
    """

    def __init__(self, spec: ExpertsSpec, isa: Isa | None = None, flags: tuple[str, ...] = ()) -> None:
        self.spec, self.isa = spec, isa or usable_isas(spec.dtype)[0]
        if spec.dtype not in self.isa.dtypes or not runs_here(self.isa):
            raise UnsupportedSpecError(f"{self.isa.name} is not for {spec.dtype} weights on this machine")
        self._library = load(Source(f"experts-{self.isa.name}", emit(spec, self.isa), (*self.isa.flags, *flags)))
        self._library.samoyeds_arguments_size.restype = ctypes.c_int64
        if self._library.samoyeds_arguments_size() != ops_library().samoyeds_arguments_size():
            raise CompilationError("the kernel and its caller lay out their arguments differently")

    def use(self) -> None:
        """Have ``samoyeds::sparse_experts`` run this kernel for its specification."""
        address, spec = ctypes.cast(self._library.samoyeds_experts, ctypes.c_void_p), self.spec
        ops_library().samoyeds_add_kernel(spec.name.encode(), address, spec.n, spec.m, spec.vector, spec.group)


@functools.lru_cache(maxsize=64)
def experts_kernel(spec: ExpertsSpec) -> ExpertsKernel:
    """The kernel for the best instruction set of this machine, in use; a process loads each once.

    Raises:
        KernelError: there is none; asked again, it is tried again.
    """
    kernel = ExpertsKernel(spec)
    kernel.use()
    return kernel
