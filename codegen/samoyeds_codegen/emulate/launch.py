"""Run a kernel in the emulator."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from samoyeds_codegen.emulate.buffers import Argument, Arguments
from samoyeds_codegen.emulate.errors import CLASSES, EmulationError, Where
from samoyeds_codegen.emulate.library import load_kernel, runtime


@dataclass(frozen=True)
class _Shape:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: int
    shared_bytes: int

    def check(self) -> None:
        x, y, z = self.block
        if not 1 <= x * y * z <= 1024:
            raise ValueError(f"a block of {self.block} threads")
        if not 1 <= self.cluster <= 8 or self.grid[0] % self.cluster:
            raise ValueError(f"a grid of {self.grid} blocks in clusters of {self.cluster}")
        if not 0 <= self.shared_bytes <= 227 << 10:
            raise ValueError(f"{self.shared_bytes} bytes of shared memory; a block has at most {227 << 10}")


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("initialised", ctypes.c_int32),
    )


class _Request(ctypes.Structure):
    """``Request`` of runtime/launch.h."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("parameters", ctypes.c_char_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
    )


class _Failure(ctypes.Structure):
    """``Failure`` of runtime/failure.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("block", ctypes.c_uint32 * 3),
        ("thread", ctypes.c_uint32 * 3),
        ("line", ctypes.c_int32),
        ("address", ctypes.c_int64),
        ("code", ctypes.c_uint64),
        ("instruction", ctypes.c_char * 64),
        ("detail", ctypes.c_char * 1024),
    )


def run(
    text: str,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    arguments: Sequence[Argument],
    *,
    cluster: int = 1,
    seed: int = 0,
) -> None:
    """Run ``kernel<<<grid, block, shared_bytes>>>`` and write its results into the tensors among ``arguments``.

    ``text`` is CUDA C++; the kernel takes one struct by value, whose fields ``arguments`` are, in order. ``cluster``
    blocks (neighbours in x) run at the same time. Seed 0 runs threads in turn, each until it has to wait; another seed
    stands for another schedule, in which a thread may be interrupted at any access to memory.

    Raises:
        EmulationError: the kernel did something wrong; the class says what, and tensors are left as they were.
        CompilationError: the text does not compile.
        ValueError: the launch does not fit the kernel or a GPU: sizes of struct, block, cluster, shared memory.
    """
    shape = _Shape(_three(grid), _three(block), cluster, shared_bytes)
    shape.check()
    library = load_kernel(text, kernel)
    packed = Arguments(arguments)
    request = _request(library, packed, shape, seed)
    failure = _Failure()
    runtime().emulated_launch(ctypes.byref(request), ctypes.byref(failure))
    if failure.kind:
        raise _error(failure, kernel, library)
    packed.copy_back()


def _request(library: ctypes.CDLL, packed: Arguments, shape: _Shape, seed: int) -> _Request:
    image = (ctypes.c_void_p * 4).in_dll(library, "emulated_image")
    library.emulated_parameter_bytes.restype = ctypes.c_ulong
    if (size := library.emulated_parameter_bytes()) != len(packed.struct):
        raise ValueError(f"the kernel's struct has {size} bytes, the arguments have {len(packed.struct)}")
    if image[2] and shape.cluster > 1:
        raise ValueError("__shared__ variables of a kernel with clusters: declare SAMOYEDS_SHARED instead")
    return _Request(
        entry=ctypes.cast(library.emulated_entry, ctypes.c_void_p),
        image=ctypes.addressof(image),
        parameters=packed.struct,
        buffers=_buffers(packed),
        buffer_count=len(packed.extents),
        grid=shape.grid,
        block=shape.block,
        cluster=shape.cluster,
        shared_bytes=shape.shared_bytes,
        seed=seed,
    )


def _buffers(packed: Arguments) -> ctypes.Array[_Buffer]:
    """By address, as the runtime looks them up."""
    parts = [
        _Buffer(" and ".join(e.names).encode(), e.copy, e.end - e.start, e.initialised)
        for e in sorted(packed.extents, key=lambda e: e.copy)
    ]
    return (_Buffer * max(1, len(parts)))(*parts)


def _three(size: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*size, 1, 1, 1)[:3]
    return x, y, z


def _error(failure: _Failure, kernel: str, library: ctypes.CDLL) -> EmulationError:
    line = failure.line or _line(library, failure.code)
    where = Where(
        kernel, tuple(failure.block), tuple(failure.thread), failure.instruction.decode(), line, failure.address
    )
    kind: int = failure.kind
    return CLASSES[kind](where, failure.detail.decode(errors="replace"))


def _line(library: ctypes.CDLL, code: int) -> int:
    """The line of the text that a return address belongs to; 0 without binutils, which compilers come with."""
    tool = shutil.which("addr2line")
    if not tool or not code:
        return 0
    done = subprocess.run([tool, "-e", library._name, hex(code - 1)], capture_output=True, text=True)
    found = re.fullmatch(r"(?:.*/)?kernel:(\d+).*", done.stdout.strip())
    return int(found[1]) if found else 0
