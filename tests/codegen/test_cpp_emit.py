"""The text of kernels: readable, the same every time, and refused where there is none."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from samoyeds_codegen.cpp.emit import TEMPLATES, emit
from samoyeds_codegen.cpp.isa import AMX, AVX2, AVX512, ISAS, PAIRS, PORTABLE
from samoyeds_codegen.cpp.ops import emit_ops
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec, ProductSpec
from samoyeds_codegen.cpp.unpack import UnpackSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.expr import ExpressionError

SPEC = ExpertsSpec("bfloat16", 1, 2, 32, 1, "silu(clamp(gate, None, 7.0)) * up", True)
DENSE = DenseExpertsSpec("bfloat16", SPEC.activation, True)
PRODUCTS = [ProductSpec("bfloat16", *each) for each in (("linear", False), ("linear", True), ("outer", True))]
EXPECTED = Path(__file__).parents[1] / "expected" / "experts_portable.cpp.expected"


def test_golden() -> None:
    """SAMOYEDS_ACCEPT=1 accepts a new text."""
    text = emit(SPEC, PORTABLE)
    if os.environ.get("SAMOYEDS_ACCEPT"):
        EXPECTED.write_text(text)
    assert text == EXPECTED.read_text(), f"{EXPECTED.name} differs; SAMOYEDS_ACCEPT=1 accepts the new text"


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_readable(isa) -> None:
    """Whoever opens it learns what it is from the first line; every line fits a screen."""
    text = emit(SPEC, isa)
    assert text.startswith(f"// Samoyeds experts: bfloat16 1:2:32+2:4 {SPEC.activation}, for {isa.name}.")
    assert "constexpr int N = 1, M = 2, V = 32, GROUP = 1;" in text
    assert "return (silu(at_most(gate, 7.0f)) * up);" in text
    assert max(map(len, text.splitlines())) <= 120
    assert ("immintrin.h" in text) == (isa != PORTABLE) and ("namespace many = amx;" in text) == (isa == AMX)


def test_names_of_specifications() -> None:
    """Ops look kernels up by them; spaces in the activation stay."""
    plain = DenseExpertsSpec("float32", "square(relu(x))", False)
    packed = ExpertsSpec("float32", 2, 4, 64, 16, "square(relu(x))", False)
    for spec in (SPEC, replace(SPEC, strips=True), packed, plain, replace(plain, by_columns=True)):
        assert type(spec).named(spec.name) == spec


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_strips(isa) -> None:
    text = emit(replace(SPEC, strips=True), isa)
    assert text.startswith(f"// Samoyeds experts: bfloat16 1:2:32+2:4 {SPEC.activation} in strips, for {isa.name}.")
    assert "constexpr int PANEL = 32;" in text and max(map(len, text.splitlines())) <= 120
    assert ("namespace many = amx;" in text) == (isa == AMX)
    row = "bf16" if isa in (AMX, PAIRS) else "float"
    assert f"using Row = {row};" in text and ("_mm512_dpbf16_ps" in text) == (row == "bf16")


@pytest.mark.parametrize("by_columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_dense(isa, by_columns: bool) -> None:
    text = emit(replace(DENSE, by_columns=by_columns), isa)
    order = " by columns" if by_columns else ""
    assert text.startswith(f"// Samoyeds experts: bfloat16 {SPEC.activation}{order}, for {isa.name}.")
    assert ("whose columns, an input each, are contiguous" in text) == by_columns
    assert "return (silu(at_most(gate, 7.0f)) * up);" in text
    assert max(map(len, text.splitlines())) <= 120
    assert ("_tile_dpbf16ps" in text) == (isa == AMX)
    assert ("_mm512_dpbf16_ps" in text) == (isa == PAIRS or (isa == AMX and not by_columns))
    assert f"using Row = {'bf16' if isa in (AMX, PAIRS) and not by_columns else 'float'};" in text
    assert f"namespace many = {'amx' if isa in (AMX, PAIRS) else 'gemm'};" in text and "metadata" not in text


@pytest.mark.parametrize("spec", PRODUCTS, ids=str)
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_products(isa, spec: ProductSpec) -> None:
    text = emit(spec, isa)
    assert text.startswith(f"// Samoyeds experts: {spec}, for {isa.name}.")
    assert max(map(len, text.splitlines())) <= 120 and "class Block" not in text
    assert f"using Product = {spec.product.capitalize()};" in text


def test_unpack() -> None:
    text = UnpackSpec(2, 1, 2, 32, 16, inner=True, strips=False).text
    assert text.startswith("// Samoyeds unpack: 1:2:32+2:4/16 of 2 bytes.") and "uint16_t" in text
    assert max(map(len, text.splitlines())) <= 120
    with pytest.raises(UnsupportedSpecError, match="3 bytes"):
        UnpackSpec(3, 1, 2, 32, 1, inner=True, strips=False)


def test_flags() -> None:
    assert PORTABLE.flags == () and AVX2.flags == ("-mavx2", "-mfma")
    assert {"-mavx512f", "-mavx512vl"} <= set(AVX512.flags)
    assert {"-mamx-bf16", "-mavx512bf16", "-mavx512vbmi2"} <= set(AMX.flags)
    assert "-mavx512bf16" in PAIRS.flags and not any("amx" in flag for flag in PAIRS.flags)


def test_every_template_is_used() -> None:
    dense = DenseExpertsSpec("bfloat16", SPEC.activation, True)
    specs = (SPEC, replace(SPEC, strips=True), dense, replace(dense, by_columns=True), *PRODUCTS)
    unpack = UnpackSpec(4, 1, 2, 32, 1, inner=True, strips=True).text
    texts = [emit_ops(), unpack, *(emit(spec, isa) for isa in ISAS for spec in specs)]
    assert all(any(path.read_text().strip() in text for text in texts) for path in TEMPLATES.rglob("*.h"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dtype": "float16"}, UnsupportedSpecError),
        ({"n": 3, "m": 4}, UnsupportedSpecError),
        ({"vector": 24}, UnsupportedSpecError),
        ({"activation": "silu(x)"}, UnsupportedSpecError),
        ({"activation": "open(gate)"}, ExpressionError),
    ],
)
def test_refused(changes: dict, error: type[Exception]) -> None:
    fields = {"dtype": "float32", "n": 1, "m": 2, "vector": 32, "group": 1, "activation": "gate * up", "gated": True}
    with pytest.raises(error):
        ExpertsSpec(**fields | changes)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (("float64", "gate * up", True), UnsupportedSpecError),
        (("float32", "silu(x)", True), UnsupportedSpecError),
        (("float32", "gate * up", False), UnsupportedSpecError),
        (("float32", "to(gate, 'bfloat16') * up", True), UnsupportedSpecError),
        (("float32", "to(x, 'float16')", False), UnsupportedSpecError),
        (("float32", "open(x)", False), ExpressionError),
    ],
)
def test_refused_dense(fields: tuple, error: type[Exception]) -> None:
    with pytest.raises(error):
        DenseExpertsSpec(*fields)
