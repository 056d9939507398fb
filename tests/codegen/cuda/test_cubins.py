"""Every kernel for every target compiles, and its machine code is what was meant."""

import os
import re
from pathlib import Path

import pytest

from benchmarks.cubins import PAGE, distinct, error_text, page_row, row_of, specs
from samoyeds_codegen.cuda.emit import TEMPLATES, emit
from samoyeds_codegen.cuda.nvrtc import compile_cubin, version
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.sass import disassemble
from samoyeds_codegen.cuda.spec import SHARED_LIMIT, ProjectionSpec
from samoyeds_codegen.cuda.wgmma import wgmma_sp

EXPECTED = Path(__file__).parents[2] / "expected" / "experts_wgmma.cu.expected"
MOST_REGISTERS = {8: 96, 16: 96, 32: 128, 64: 255, 128: 168}
"""Of a thread, by tokens of a tile. A warpgroup has 168 as it starts, and takes up to 208 from the one that copies."""


def check_page(row) -> None:
    """docs/gpu_cuda.md has the row; the numbers are the compiler's, so only those of the same version must agree."""
    page = PAGE.read_text(encoding="utf-8")
    same = f"Made with NVRTC {version()}:" in page
    wanted = page_row(row) if same else f"| {row.kernel} | {row.target} |"
    remedy = "python -m benchmarks.gpu --compile-only --page writes it again"
    assert wanted in page, f"docs/gpu_cuda.md has another row than {page_row(row)}; {remedy}"


@pytest.mark.parametrize("spec", specs(), ids=str)
def test_machine_code(spec) -> None:
    pytest.importorskip("triton", reason="brings cuobjdump; there is none for this platform")
    cubin = compile_cubin(emit(spec), spec.target)
    said = cubin.with_name("kernel.log").read_text()
    assert "warning" not in said and "serialized" not in said  # wgmma that waits for each other
    sass = disassemble(cubin)
    check_page(row_of(spec, sass, 0.0))
    assert sass.spills == sass.stack == sass.local == 0
    assert spec.shared_bytes + sass.static_shared <= (SHARED_LIMIT[spec.target] + 1) * 1024
    assert sass.registers * spec.threads <= 65536 and "registers" in said
    if not isinstance(spec, ProjectionSpec):
        assert sass.sparse == 0
        return
    form = ("HGMMA", "SP", f"64x{spec.tokens}x32") if spec.wgmma else ("HMMA", "SP", "16832")
    form = (*form, "F32", *(["BF16"] if spec.dtype == "bfloat16" else []))
    slabs = 1 if spec.wgmma else spec.row_tiles * spec.tokens // 8
    assert sass.count(*form) == sass.sparse >= 4 * slabs
    assert sass.registers <= MOST_REGISTERS[spec.tokens] or spec.wgmma
    assert 0 < sass.count("LDGSTS") - sass.count("LDGSTS", "128") <= sass.count("LDGSTS", "128")  # metadata, the rest
    assert not spec.variant.in_registers or (
        sass.count("SHFL") >= 8 and sass.wide_loads >= 8
    )  # weights, not through copies
    assert not (spec.direct and sass.count("FFMA"))  # whose sub-rows tensor cores choose


@pytest.mark.parametrize("name", distinct())
def test_emulator_error(name) -> None:
    """The last column of the page, for all targets, is what the emulator finds now, and is that of rounding."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} | sm_")]
    found = {line.split("|")[-2].strip() for line in rows}
    text = error_text(distinct()[name])
    remedy = "python -m benchmarks.gpu --compile-only --page writes it again"
    assert rows and found == {text}, f"docs/gpu_cuda.md has {found} as the error of {name}, not {text}; {remedy}"
    assert float(text) <= (4e-3 if "bfloat16" in name else 5e-4)


def test_golden() -> None:
    """SAMOYEDS_ACCEPT=1 accepts a new text."""
    text = emit(ProjectionSpec("up", "sm_90a", Pattern(1, 2, 128), "bfloat16", 128, 16, 4, "silu(gate) * up", True))
    if os.environ.get("SAMOYEDS_ACCEPT"):
        EXPECTED.write_text(text)
    assert text == EXPECTED.read_text(), f"{EXPECTED.name} differs; SAMOYEDS_ACCEPT=1 accepts the new text"


def test_text_is_readable() -> None:
    """Whoever opens it learns what it is from the first line; every line fits a screen."""
    for spec in specs():
        text = emit(spec)
        assert text.startswith(f"// Samoyeds {spec}. Generated, do not edit.\n")
        assert max(map(len, text.splitlines())) <= 120
        assert text == emit(spec)


def test_every_template_is_used() -> None:
    texts = [emit(spec) for spec in specs()]
    assert all(any(path.read_text().strip() in text for text in texts) for path in TEMPLATES.glob("*.cuh"))


def test_instructions_are_only_where_an_emulator_replaces_them() -> None:
    for spec in specs():
        text = re.sub(r"#ifndef SAMOYEDS_EMULATED.*?#endif", "", emit(spec), flags=re.DOTALL)
        assert "asm" not in text


def test_wide_instruction_names_all_sums() -> None:
    text = wgmma_sp("float16", 64)
    assert "m64n64k32.f32.f16.f16" in text and '"+f"(d[31])' in text and "%34, 1, 1, 1, 1, 0, 0;" in text
