"""Compile CUDA with NVRTC, which needs no GPU, no driver and no toolkit.

It needs the packages ``cuda-bindings`` and ``nvidia-cuda-nvrtc``: CUDA builds of PyTorch bring them, and the extra
``cuda-compile`` installs them elsewhere.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from samoyeds_codegen.build import LOG, cache_directory, cached, log_text
from samoyeds_codegen.errors import CompilationError, CompilerNotFoundError, KernelError

OPTIONS = ("--std=c++17", "--ptxas-options=-v")
REMEDY = 'pip install "samoyeds-compile[cuda-compile]"'


def compile_cubin(text: str, target: str, name: str = "cuda") -> Path:
    """The cubin of a text, compiled unless the cache has it.

    Args:
        text: CUDA without includes.
        target: ``sm_80`` and so on.
        name: for people who look into the cache.

    Returns:
        The file; beside it ``kernel.cu`` is the text and ``kernel.log`` what the compiler said.

    Raises:
        CompilerNotFoundError: NVRTC is missing; the message says what to install.
        CompilationError: it refused the text.
        CacheError: there is no folder for the result.
    """
    entry = _entry(text, target, name)
    return cached(entry, "kernel.cubin", lambda folder: _compile_into(folder, text, target)) / "kernel.cubin"


def compile_log(text: str, target: str, name: str = "cuda") -> str:
    """How a cubin was compiled: version, options, seconds, messages; empty if the cache does not have it."""
    try:
        return (cache_directory() / _entry(text, target, name) / LOG).read_text()
    except (OSError, KernelError):
        return ""


def _entry(text: str, target: str, name: str) -> str:
    key = "\0".join((text, target, version(), *OPTIONS))
    return f"{name}-{target}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def version() -> str:
    """NVRTC's version, as ``13.0``.

    Raises:
        CompilerNotFoundError: it is missing.
    """
    nvrtc = _nvrtc()
    return ".".join(map(str, _checked(nvrtc, nvrtc.nvrtcVersion())))


def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library
    except (ImportError, RuntimeError) as error:  # the library is another package than its bindings
        raise CompilerNotFoundError(f"NVRTC is missing ({error}); {REMEDY}") from error
    return nvrtc  # type: ignore[no-any-return]  # where the package is missing it has no type


def _checked(nvrtc: ModuleType, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call gives after its status."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompilationError(f"NVRTC: {status.name}")
    return tuple(values)


def _compile_into(folder: Path, text: str, target: str) -> None:
    (folder / "kernel.cu").write_text(text)
    start = time.perf_counter()
    cubin, said = _compile(text, target)
    (folder / "kernel.cubin").write_bytes(cubin)
    command = ["nvrtc", f"--gpu-architecture={target}", *OPTIONS, "kernel.cu"]
    (folder / LOG).write_text(log_text(f"NVRTC {version()}", command, time.perf_counter() - start, said))


def _compile(text: str, target: str) -> tuple[bytes, str]:
    nvrtc = _nvrtc()
    (program,) = _checked(nvrtc, nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    try:
        options = [f"--gpu-architecture={target}".encode(), *(o.encode() for o in OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        said = _read(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
        log = said.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompilationError(f"NVRTC {version()}, {target}:\n{log}")
        return _read(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(nvrtc: ModuleType, program: Any, size: Any, get: Any) -> bytes:
    (count,) = _checked(nvrtc, size(program))
    buffer = bytes(count)  # the bindings write into it, and take nothing else
    _checked(nvrtc, get(program, buffer))
    return buffer
