"""The ops in C++: a library that registers them with torch, so that no Python runs in a call.

It is compiled against torch's stable ABI, once a machine, and knows kernels by name (`templates/ops/kernels.h`).
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import torch

from samoyeds_codegen.build import Source, load
from samoyeds_codegen.cpp.emit import template
from samoyeds_codegen.errors import KernelError

logger = logging.getLogger(__name__)

_INCLUDES = (
    "algorithm cmath cstdint cstring locale mutex optional sstream stdexcept string tuple unordered_map utility vector "
    "omp.h torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h torch/csrc/stable/library.h "
    "torch/csrc/stable/ops.h torch/csrc/stable/tensor.h torch/headeronly/util/BFloat16.h torch/headeronly/util/Half.h"
).split()
_PARTS = "tensors kernels experts sparse_experts dense_experts router library".split()
KINDS = ("packed", "dense")
"""Of weights; each has arguments of its own."""
_ABI = "0x020b000000000000"
"""Of torch 2.11: only what it has is used."""


def emit_ops() -> str:
    """C++ of the library; the same text on every machine."""
    return "\n\n".join(
        [
            "// Samoyeds ops. Generated, do not edit.",
            "\n".join(f"#include <{name}>" for name in _INCLUDES),
            "namespace {",
            template("numbers.h"),
            "using Weight = void;  // kernels know what it is, and how many rows they take at a time",
            "constexpr int PANEL = 1;",
            template("prelude.h"),
            *map(_arguments, KINDS),
            *(template(f"ops/{part}.h") for part in _PARTS),
            "",
        ]
    )


def _arguments(kind: str) -> str:
    return "\n".join([f"namespace {kind} {{", template(f"{kind}_matrix.h"), template("arguments.h"), "}"])


@functools.cache
def ops_library() -> ctypes.CDLL:
    """The library, loaded; from then on the ops run it. A process loads one.

    Raises:
        KernelError: it cannot be compiled or loaded.
    """
    library = load(Source("ops", emit_ops(), _flags()))
    library.samoyeds_threads.restype, library.samoyeds_threads.argtypes = ctypes.c_int64, (ctypes.c_int64,)
    library.samoyeds_add_kernel.argtypes = (ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int64] * 7)
    library.samoyeds_add_kernel.restype = None
    return library


@functools.cache
def has_ops_library() -> bool:
    """Whether there is one; a process asks once, as a compiler that fails takes its time each time."""
    try:
        ops_library()
    except KernelError as error:
        logger.warning("samoyeds ops run without C++: %s", error)
        return False
    return True


def arguments_size(kind: str) -> int:
    """Bytes of the arguments that ops pass to kernels for a kind of weights."""
    size = getattr(ops_library(), f"samoyeds_{kind}_arguments_size")
    size.restype = ctypes.c_int64
    return int(size())


def _flags() -> tuple[str, ...]:
    root = Path(torch.__file__).parent
    return (
        f"-I{root / 'include'}", f"-L{root / 'lib'}", "-ltorch_cpu", f"-DTORCH_TARGET_VERSION={_ABI}",
        f'-DSAMOYEDS_TORCH="{torch.__version__}"',
    )  # fmt: skip
