"""Kernels compiled ahead of time, for a GPU that need not be there: what they need of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samoyeds_codegen.errors import CompilationError
from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.emit import emit
from samoyeds_codegen.triton.kernel import interprets
from samoyeds_codegen.triton.spec import KernelSpec

CAPABILITIES = (80, 90, 100)
"""Ampere, Hopper, Blackwell; Triton compiles for others as well."""
SECONDS = 60
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_STORED = {"VALUES": None, "METADATA": "*i16", "SELECTION": "*u8", "ORDER": "*i64", "TILES": "*i32"}


@dataclass(frozen=True)
class Assembled:
    """A compiled kernel.

    Attributes:
        registers: 32-bit registers a thread.
        stack: bytes of a thread's stack; registers that were spilled lie there.
        shared: bytes of shared memory a program.
        sass: its instructions, as ``cuobjdump`` prints them.
    """

    registers: int
    stack: int
    shared: int
    sass: str


def assemble(spec: KernelSpec, capability: int, bias: bool = False, contiguous: str = "col") -> Assembled:
    """Compile a kernel for a compute capability (90 for 9.0), with all sizes and strides multiples of 16.

    Args:
        spec: the kernel.
        capability: of the target.
        bias: whether the projections have biases.
        contiguous: the dimension of a dense weight whose stride is 1, ``row`` or ``col``.

    Raises:
        CompilationError: there is no Triton, it interprets, or it or its assembler refuses the kernel.
    """
    if interprets():
        raise CompilationError("Triton interprets its kernels; unset TRITON_INTERPRET to compile them")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = load_text(spec.op, emit(spec)).project
    types = {name: _type(name, spec, bias, contiguous) for name in function.arg_names}
    constants = {name: value for name, value in types.items() if not isinstance(value, str)}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    aligned = [i for i, name in enumerate(function.arg_names) if name not in (*constants, "tiles", "top_k")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    options = {"num_warps": spec.tile.warps, "num_stages": spec.tile.stages}
    try:
        source = ASTSource(function, signature, {name: _constant(v) for name, v in constants.items()}, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton's own kinds of errors differ between versions
        raise CompilationError(f"{spec} for sm_{capability}: {type(error).__name__}: {error}") from error
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


@dataclass(frozen=True)
class _Constant:
    value: Any


def _constant(constant: _Constant) -> Any:
    return constant.value


def _type(name: str, spec: KernelSpec, bias: bool, contiguous: str) -> str | _Constant:
    """The type of a parameter, or the value that Triton would specialise on."""
    value = _POINTERS[spec.experts.dtype]
    if name == "UPCAST":
        return _Constant(False)
    if name.endswith("_BIAS") and not bias:
        return _Constant(None)
    if name.endswith(f"_{contiguous}") and spec.experts.pattern is None:
        return _Constant(1)
    if name.endswith("_bias_row"):
        return _Constant(1)
    if name.isupper():
        return _STORED.get(name.rpartition("_")[2]) or value
    return "i32"


def _read(cubin: bytes, shared: int) -> Assembled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = _dump(path, "-res-usage"), _dump(path, "-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise CompilationError(f"cuobjdump says nothing of registers: {usage}")
    return Assembled(int(found[1]), int(found[2]), shared, sass)


def _dump(cubin: Path, option: str) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilationError(f"{' '.join(command)}: {error}") from error
    return done.stdout
