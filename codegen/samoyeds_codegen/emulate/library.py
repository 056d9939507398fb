"""Compile a kernel's text, and the runtime it calls, with the machine's C++ compiler."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from samoyeds_codegen.build import Source, load

_HERE = Path(__file__).parent
_DEVICE_INCLUDES = ("cstdint",)
_RUNTIME_INCLUDES = (
    "algorithm bitset cmath cstdarg cstdint cstdio cstdlib cstring deque map memory new string utility vector "
    "sys/mman.h ucontext.h"
).split()
_RUNTIME = (
    "failure clock space fiber machine memory atomics collective barriers mbarrier copies mma wgmma hooks special "
    "schedule launch"
).split()

KERNEL_FLAGS = (
    # Hooks are calls that the optimiser leaves in place; more optimisation only takes longer to compile.
    "-O1",
    "-g1",
    "-gdwarf-4",
    "-w",
    # What CUDA's compiler fuses or not is not ours to guess: one rounding for each operation of the text.
    "-ffp-contract=off",
    # Kernels look at the same bytes as words, pairs and numbers.
    "-fno-strict-aliasing",
    # Plain loads and stores call the runtime, and so does arithmetic that CUDA and C++ do not define, or not alike, ...
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,shift-exponent,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow",
    # ... which stands for the sanitizers' own libraries.
    "-nodefaultlibs",
    # A variable without a value has one that the runtime knows.
    "-ftrivial-auto-var-init=pattern",
)


def load_kernel(text: str, kernel: str) -> ctypes.CDLL:
    """The library of one kernel of a text, ready for the runtime.

    Raises:
        CompilationError: the compiler refused the text; its lines are numbered as in ``text``.
    """
    libraries = (runtime()._name, "-lstdc++", "-lm", "-lc", "-lgcc_s")
    parts = [
        "#define SAMOYEDS_EMULATED 1",
        *_includes(_DEVICE_INCLUDES),
        *(_file(f"device/{name}.h") for name in ("api", "numbers", "cuda", "ptx")),
        '#line 1 "kernel"',
        text,
        '#line 1 "entry"',
        f"#define EMULATED_KERNEL {kernel}",
        _file("device/entry.h"),
    ]
    return load(Source("emulated", "\n".join(parts), (*KERNEL_FLAGS, *libraries)))


def runtime() -> ctypes.CDLL:
    """The library that schedules threads and executes instructions."""
    return load(Source("emulator", _runtime_text(), ("-w",)))


@functools.cache
def _runtime_text() -> str:
    shared = [_file(f"device/{name}.h") for name in ("api", "numbers")]
    return "\n".join([*_includes(_RUNTIME_INCLUDES), *shared, *(_file(f"runtime/{name}.h") for name in _RUNTIME)])


def _includes(names: tuple[str, ...] | list[str]) -> list[str]:
    return [f"#include <{name}>" for name in names]


@functools.cache
def _file(name: str) -> str:
    return (_HERE / name).read_text()
