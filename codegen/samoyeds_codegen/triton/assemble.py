"""Kernels compiled ahead of time, for a GPU that need not be there: what they need of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samoyeds_codegen.errors import CompilationError
from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.emit import emit, emit_gradients, emit_plan, emit_table
from samoyeds_codegen.triton.gradients import OUTER
from samoyeds_codegen.triton.kernel import COMBINED_COLS, interprets
from samoyeds_codegen.triton.matrices import ALIGNED
from samoyeds_codegen.triton.spec import KernelSpec

CAPABILITIES = (80, 90, 100)
"""Ampere, Hopper, Blackwell; Triton compiles for others as well."""
SECONDS = 60
UNALIGNED = ("tiles", "top_k", "experts")
"""Whole numbers that are no multiples of 16 as a rule."""
_POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
_STORED = {"VALUES": None, "METADATA": "*i16", "SELECTION": "*u8", "ORDER": "*i64", "TILES": "*i32", "TABLE": "*i64"}
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "metadata": 2, "selection": 1}
"""Bytes of an element."""


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


@dataclass(frozen=True)
class Constant:
    """The value of a parameter that Triton specialises on."""

    value: Any


Kind = str | Constant
"""What a parameter is: a type as Triton writes it, or a value."""


def assemble(
    spec: KernelSpec, capability: int, bias: bool = False, contiguous: str = "col", gathered: bool = False
) -> Assembled:
    """Compile a projection for a compute capability (90 for 9.0), with all sizes and strides multiples of 16.

    Args:
        spec: the kernel.
        capability: of the target.
        bias: whether the projections have biases.
        contiguous: the dimension of a dense weight whose stride is 1, ``row`` or ``col``.
        gathered: whether rows come in slot order, so that there is no order to read.

    Raises:
        CompilationError: there is no Triton, it interprets, or it or its assembler refuses the kernel.
    """
    _require_compiler()
    function = load_text(spec.op, emit(spec)).project
    kinds = {name: _kind(name, spec, bias, contiguous, gathered) for name in function.arg_names}
    return _assemble(function, kinds, spec.tile.warps, spec.tile.stages, capability)


def assemble_plan(capability: int) -> dict[str, Assembled]:
    """Compile what is the same for all experts, for bfloat16 rows: work list, gather, weighted sum, and the table."""
    _require_compiler()
    plan = load_text("plan", emit_plan())
    tiles = _kinds(plan.tiles, OFFSETS="*i32", TILES="*i32", EXPERTS=Constant(128), SLOTS=Constant(64))
    combine = _kinds(plan.combine, Y="*bf16", SLOT="*i64", WEIGHTS="*fp32", OFFSETS="*i32", OUT="*bf16",
                     COLS=Constant(COMBINED_COLS), weights_k=Constant(1))  # fmt: skip
    gather = _kinds(plan.gather, X="*bf16", ORDER="*i64", OFFSETS="*i32", OUT="*bf16", COLS=Constant(COMBINED_COLS))
    table = load_text("table", emit_table()).table
    numbers = {name: "i64" for name in table.arg_names} | {"TABLE": "*i64"}
    return {
        "gather": _assemble(plan.gather, gather, 4, 3, capability),
        "table": _assemble(table, numbers, 1, 3, capability),
        "tiles": _assemble(plan.tiles, tiles, 1, 1, capability),
        "combine": _assemble(plan.combine, combine, 4, 3, capability),
    }


def assemble_gradient(dtype: str, capability: int, mask: bool = False) -> Assembled:
    """Compile the gradient of a weight."""
    _require_compiler()
    tile, rows = OUTER["full" if dtype == "float32" else "half"], _POINTERS[dtype]
    function = load_text("gradients", emit_gradients()).outer
    kinds = _kinds(
        function, GRAD=rows, X=rows, ORDER="*i64", OFFSETS="*i32", MASK="*i1" if mask else Constant(None), OUT=rows,
        mask_col=Constant(1), out_col=Constant(1), ROWS=Constant(tile.rows), COLS=Constant(tile.cols),
        SLOTS=Constant(tile.slots), UPCAST=Constant(False),
    )  # fmt: skip
    return _assemble(function, kinds, tile.warps, tile.stages, capability)


def _require_compiler() -> None:
    if interprets():
        raise CompilationError("Triton interprets its kernels; unset TRITON_INTERPRET to compile them")


def _kinds(function: Any, **known: Kind) -> dict[str, Kind]:
    """A kind for every parameter of a function; those that are not named are whole numbers."""
    return {name: known.get(name, "i32") for name in function.arg_names}


def _assemble(function: Any, kinds: Mapping[str, Kind], warps: int, stages: int, capability: int) -> Assembled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: kind.value for name, kind in kinds.items() if isinstance(kind, Constant)}
    signature = {name: "constexpr" if isinstance(kind, Constant) else kind for name, kind in kinds.items()}
    aligned = [
        i
        for i, name in enumerate(kinds)
        if name not in constants and name not in UNALIGNED and not name.startswith("number_")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    options = {"num_warps": warps, "num_stages": stages}
    try:
        source = ASTSource(function, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton's own kinds of errors differ between versions
        raise CompilationError(f"{function} for sm_{capability}: {type(error).__name__}: {error}") from error
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _kind(name: str, spec: KernelSpec, bias: bool, contiguous: str, gathered: bool) -> Kind:
    """The type of a parameter, or the value that Triton would specialise on."""
    value = _POINTERS[spec.experts.dtype]
    if name == "UPCAST":
        return Constant(False)
    if name == "ORDER" and gathered:
        return Constant(None)
    if name.endswith("_unit"):
        part = name.removesuffix("_unit").rpartition("_")[2]
        return Constant(ALIGNED // _SIZES.get(part, _SIZES[spec.experts.dtype]))
    if name.endswith("_BIAS") and not bias:
        return Constant(None)
    if name.endswith(f"_{contiguous}") and spec.experts.pattern is None:
        return Constant(1)
    if name.endswith("_bias_row"):
        return Constant(1)
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
