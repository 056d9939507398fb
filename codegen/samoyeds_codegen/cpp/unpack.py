"""Compiled unpacking of sparse weights."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from torch import Tensor

from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.emit import template
from samoyeds_codegen.cpp.ops import ops_library
from samoyeds_codegen.errors import CompilationError, UnsupportedSpecError

_FIELDS = 10
"""Of a call; each takes eight bytes."""
_INCLUDES = "algorithm cstdint cstring exception omp.h".split()
_TYPES = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}


@dataclass(frozen=True)
class UnpackSpec:
    """How packed weights are stored.

    Attributes:
        size: bytes of a value.
        n, m, vector, group: of the pattern.
        inner: whether 2 of 4 columns of kept sub-rows are stored, else all.
        strips: whether storage is in strips, else it is canonical.

    Raises:
        UnsupportedSpecError: the pattern is none, or values have another size.
    """

    size: int
    n: int
    m: int
    vector: int
    group: int
    inner: bool
    strips: bool

    def __post_init__(self) -> None:
        if self.size not in _TYPES:
            raise UnsupportedSpecError(f"values of {self.size} bytes")
        if not 0 < self.n <= self.m or self.vector % 4 or self.group < 1:
            raise UnsupportedSpecError(f"{self.n}:{self.m}:{self.vector}, group {self.group}")

    def __str__(self) -> str:
        """One line."""
        inner, order = "+2:4" if self.inner else "", " in strips" if self.strips else ""
        return f"{self.n}:{self.m}:{self.vector}{inner}/{self.group} of {self.size} bytes{order}"

    @property
    def text(self) -> str:
        """C++."""
        constants = [
            f"constexpr int64_t N = {self.n}, M = {self.m}, V = {self.vector}, GROUP = {self.group};",
            f"constexpr bool INNER = {str(self.inner).lower()}, STRIPS = {str(self.strips).lower()};",
            f"using Value = {_TYPES[self.size]};",
        ]
        parts = [
            f"// Samoyeds unpack: {self}.\n// Generated, do not edit.",
            "\n".join(f"#include <{name}>" for name in _INCLUDES),
            "namespace samoyeds {",
            "\n".join(constants),
            template("unpack.h"),
            "using Product = Unpack;\nusing Call = UnpackCall;",
            template("products_entry.h"),
        ]
        return "\n\n".join(parts) + "\n"


class UnpackKernel:
    """A compiled specification.

    Raises:
        KernelError: it cannot be compiled or loaded; the class says why.
    """

    def __init__(self, spec: UnpackSpec, flags: tuple[str, ...] = ()) -> None:
        self.spec, self._library = spec, load(Source("unpack", spec.text, flags))
        self._library.samoyeds_call_size.restype = self._library.samoyeds_product.restype = ctypes.c_int64
        if self._library.samoyeds_call_size() != 8 * _FIELDS:
            raise CompilationError("the kernel and its caller lay out their arguments differently")

    def __call__(self, values: Tensor, metadata: Tensor | None, selection: Tensor | None, out: Tensor) -> None:
        """Write the dense weights of storage, all contiguous, into ``out`` [..., rows, cols]."""
        condensed, stored = values.shape[-2:]
        matrices, (rows, cols) = values[..., 0, 0].numel(), out.shape[-2:]
        threads = int(ops_library().samoyeds_threads(out.numel()))
        fields = (
            values.data_ptr(), _address(metadata), _address(selection), out.data_ptr(), matrices, condensed,
            stored * 2 if self.spec.inner else stored, rows, cols, threads,
        )  # fmt: skip
        self._library.samoyeds_product((ctypes.c_int64 * _FIELDS)(*fields))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(maxsize=32)
def unpack_kernel(spec: UnpackSpec) -> UnpackKernel:
    """The kernel; a process loads each once.

    Raises:
        KernelError: there is none; asked again, it is tried again.
    """
    ops_library()  # counts threads in each call
    return UnpackKernel(spec)
