"""Every CUDA kernel for every target, compiled without a GPU: what machine code came out, and what it computes."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.emulated import error_of
from samoyeds_codegen.build import DIRECTORY_VARIABLE
from samoyeds_codegen.cuda.emit import emit
from samoyeds_codegen.cuda.nvrtc import compile_cubin, version
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.sass import Sass, disassemble
from samoyeds_codegen.cuda.spec import SHARED_LIMIT, VARIANTS, CombineSpec, KernelSpec, ProjectionSpec, RouteSpec

SWIGLU, GEGLU = "silu(gate) * up", "gelu(gate, 'tanh') * up"
P12, P12_32, P24, P11 = Pattern(1, 2, 128), Pattern(1, 2, 32), Pattern(2, 4, 64), Pattern(1, 1, 32)
P12_16, P12_64 = Pattern(1, 2, 32, 16), Pattern(1, 2, 128, 64)
BF, FP = "bfloat16", "float16"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu_cuda.md"
MARKS = ("<!-- table of kernels: python -m benchmarks.gpu --compile-only --page -->", "<!-- end of the table -->")
WIDTH = 140
"""Characters of the table, whatever the terminal's width is."""
MMA_TARGETS = tuple(target for target in SHARED_LIMIT if target != "sm_90a")


@dataclass(frozen=True)
class Row:
    """One kernel for one target; ``seconds`` is the time of this compilation."""

    kernel: str
    target: str
    sparse: int
    registers: int
    shared: int
    spills: int
    wide: int
    seconds: float


def specs() -> list[KernelSpec]:
    """What is looked at: each pattern, dtype and kind of tile, on each target that has it."""
    return [spec for target in MMA_TARGETS for spec in _mma(target)] + _wgmma("sm_90a")


def _mma(target: str) -> list[KernelSpec]:
    return [
        RouteSpec(target, 128, 16),
        ProjectionSpec("up", target, P12, BF, 64, 8, 4, SWIGLU, True),
        ProjectionSpec("up", target, P12_32, BF, 64, 64, 3, SWIGLU, True, True),
        ProjectionSpec("up", target, P11, FP, 64, 64, 3, "square(relu(x))", False, True),
        ProjectionSpec("up", target, P24, FP, 64, 64, 3, GEGLU, True),
        ProjectionSpec("down", target, P12_16, BF, 64, 16, 4),
        ProjectionSpec("down", target, P11, BF, 128, 32, 3),
        CombineSpec(target, BF, "float32", BF),
    ]


def _wgmma(target: str) -> list[KernelSpec]:
    return [
        ProjectionSpec("up", target, P12, BF, 128, 16, 4, SWIGLU, True),
        ProjectionSpec("up", target, P12, BF, 128, 128, 4, SWIGLU, True),
        ProjectionSpec("up", target, P12, BF, 128, 128, 4, SWIGLU, True, variant=VARIANTS["pairs"]),
        ProjectionSpec("down", target, P24, FP, 128, 64, 4, bias=True, variant=VARIANTS["pairs"]),
        ProjectionSpec("up", target, P12, BF, 128, 128, 4, SWIGLU, True, variant=VARIANTS["registers"]),
        ProjectionSpec("down", target, P24, FP, 128, 64, 4, bias=True, variant=VARIANTS["registers"]),
        ProjectionSpec("down", target, P11, BF, 128, 128, 4, variant=VARIANTS["registers"]),
        ProjectionSpec("up", target, P12, BF, 128, 128, 4, SWIGLU, True, variant=VARIANTS["token_pairs"]),
        ProjectionSpec("down", target, P24, FP, 128, 64, 4, bias=True, variant=VARIANTS["token_pairs"]),
        ProjectionSpec("up", target, P12, BF, 128, 128, 4, SWIGLU, True, variant=VARIANTS["register_pairs"]),
        ProjectionSpec("down", target, P11, FP, 128, 128, 4, variant=VARIANTS["register_pairs"]),
        ProjectionSpec("up", target, P12_32, FP, 128, 128, 4, SWIGLU, True, True),
        ProjectionSpec("up", target, P11, BF, 128, 128, 4, SWIGLU, True),
        ProjectionSpec("up", target, P24, BF, 128, 64, 4, GEGLU, True),
        ProjectionSpec("down", target, P12, BF, 128, 32, 4),
        ProjectionSpec("down", target, P12, BF, 128, 128, 4),
        ProjectionSpec("down", target, P12_64, BF, 128, 128, 4),
        ProjectionSpec("down", target, P11, FP, 128, 64, 4, "x", False, True),
    ]


@contextmanager
def fresh_cache() -> Iterator[None]:
    """An empty cache of kernels, so that seconds are those of compiling."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {DIRECTORY_VARIABLE: folder}):
        yield


def measure(spec: KernelSpec) -> Row:
    """Compile a kernel, unless the cache has it, and read the machine code."""
    began = time.perf_counter()
    cubin = compile_cubin(emit(spec), spec.target)
    seconds = time.perf_counter() - began
    return row_of(spec, disassemble(cubin), seconds)


def kernel_name(spec: KernelSpec) -> str:
    """The specification without its target."""
    return str(spec).removesuffix(f" {spec.target}")


def row_of(spec: KernelSpec, sass: Sass, seconds: float) -> Row:
    """What is worth showing of a kernel."""
    wide = sass.wide_copies + sass.wide_loads
    spills = sass.spills + (sass.stack > 0)
    shared = spec.shared_bytes + sass.static_shared
    return Row(kernel_name(spec), spec.target, sass.sparse, sass.registers, shared, spills, wide, round(seconds, 2))


def table(rows: list[Row], errors: dict[str, str]) -> Table:
    """The same for the terminal."""
    found = Table(title=f"NVRTC {version()}")
    for column in (
        "kernel",
        "target",
        "sparse MMA",
        "registers",
        "shared bytes",
        "spills",
        "16-byte",
        "seconds",
        "error",
    ):
        found.add_column(column, justify="left" if column in ("kernel", "target") else "right", no_wrap=True)
    for row in rows:
        found.add_row(*(str(value) for value in vars(row).values()), errors.get(row.kernel, ""))
    return found


def page_row(row: Row) -> str:
    """A line of the page, without the time, which is another one on every machine."""
    return "| " + " | ".join(map(str, list(vars(row).values())[:-1])) + " |"


def page_table(rows: list[Row], errors: dict[str, str]) -> str:
    """What lies between the marks of docs/gpu_cuda.md."""
    head = "| kernel | target | sparse MMA | registers | shared bytes | spills | 16-byte | emulator error |"
    lines = [f"{page_row(row)} {errors.get(row.kernel, '')} |" for row in rows]
    return "\n".join([f"Made with NVRTC {version()}:", "", head, "|---|---|" + "---:|" * 6, *lines])


def emulator_errors() -> dict[str, str]:
    """The error of each kernel by its name; the text is the same for all targets that have the instruction."""
    return {name: error_text(spec) for name, spec in track(distinct().items(), "emulating")}


def distinct() -> dict[str, KernelSpec]:
    """Each kernel once, by its name without a target."""
    seen: dict[str, KernelSpec] = {}
    for spec in specs():
        seen.setdefault(kernel_name(spec), spec)
    return seen


def error_text(spec: KernelSpec) -> str:
    """The emulator's error as the page has it; none at all is ``0``."""
    error = error_of(spec)
    return f"{error:.1e}" if error else "0"


def write_page(rows: list[Row], errors: dict[str, str]) -> None:
    """Put the table into the page."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = after.partition(MARKS[1])[2]
    text = f"{before}{MARKS[0]}\n{page_table(rows, errors)}\n{MARKS[1]}{after}"
    PAGE.write_text(text, encoding="utf-8")


def main(json_file: Path | None, page: bool) -> None:
    """Print the table; write it as JSON if a file is named, and into the page if asked for."""
    with fresh_cache():
        rows = [measure(spec) for spec in track(specs(), "compiling")]
    errors = emulator_errors()
    Console(width=WIDTH).print(table(rows, errors))
    if json_file is not None:
        content = {"nvrtc": version(), "kernels": [vars(row) for row in rows], "emulator_errors": errors}
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if page:
        write_page(rows, errors)
