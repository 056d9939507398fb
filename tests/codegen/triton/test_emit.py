"""Specifications and the text of kernels: readable, the same every time, and refused where there is none."""

import ast
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.expr import ExpressionError
from samoyeds_codegen.triton.emit import TEMPLATES, emit, emit_gradients, emit_plan, emit_table
from samoyeds_codegen.triton.index import block_row, selection_row, stored_rows
from samoyeds_codegen.triton.select import backs, candidates, choose, choose_back, kernels
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Pattern, Tile

ACTIVATION = "silu(clamp(gate, None, 7.0)) * up"
SPEC = ExpertsSpec("bfloat16", Pattern(1, 2, 32), ACTIVATION, True)
TILE = Tile(32, 16, 32, 4, 3)
PLAIN = ExpertsSpec("float32", None, "square(relu(x))", False)
PATTERNS = [None, Pattern(1, 1, 32), Pattern(1, 2, 32), Pattern(2, 4, 64, 16)]
EXPECTED = Path(__file__).parents[2] / "expected" / "triton_up.py.expected"


def test_golden():
    """SAMOYEDS_ACCEPT=1 accepts a new text."""
    text = emit(KernelSpec("up", SPEC, TILE))
    if os.environ.get("SAMOYEDS_ACCEPT"):
        EXPECTED.write_text(text)
    assert text == EXPECTED.read_text(), f"{EXPECTED.name} differs; SAMOYEDS_ACCEPT=1 accepts the new text"


@pytest.mark.parametrize(
    ("op", "pattern"), [*product(("up", "down"), PATTERNS), *(("back", p) for p in PATTERNS if p)], ids=str
)
def test_readable(op, pattern):
    """Whoever opens it learns what it is from the first line; every line fits a screen; nothing is left over."""
    spec = KernelSpec(op, ExpertsSpec("bfloat16", pattern, ACTIVATION, True), TILE)
    text = emit(spec)
    assert text.startswith(f'"""Samoyeds {op} bfloat16 {pattern or "dense"} {ACTIVATION}, tile 32x16x32 w4 s3.\n')
    assert max(map(len, text.splitlines())) <= 120 and "$" not in text
    defined = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
    assert all(text.count(f"{name}(") > 1 for name in defined - {"project"})
    assert ("silu" in defined) == (op == "up") and ("unpack" in defined) == (pattern is not None)


def test_every_template_is_used():
    """By its longest line without a hole."""
    specs = [ExpertsSpec("float32", pattern, "gelu(gate) * up", True) for pattern in PATTERNS]
    texts = [
        emit_plan(),
        emit_gradients(),
        emit_table(),
        *(emit(KernelSpec(op, s, TILE)) for op in ("up", "down") for s in specs),
        *(emit(KernelSpec("back", s, TILE)) for s in specs if s.pattern),
    ]
    for path in TEMPLATES.glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if "$" not in line and not line.startswith("[")]
        whole = max(lines, key=len, default="")
        assert any(whole in text for text in texts) or path.stem == "functions", path


def test_names_of_specifications():
    """Ops look kernels up by them; spaces in the activation stay."""
    for spec in (
        SPEC,
        PLAIN,
        replace(PLAIN, separate=True),
        ExpertsSpec("float16", Pattern(2, 4, 64, 16), "gelu(gate, 'tanh') * up", True),
    ):
        assert ExpertsSpec.named(spec.name) == spec
    assert str(KernelSpec("up", SPEC, TILE)) == f"up bfloat16 1:2:32+2:4 {ACTIVATION}, tile 32x16x32 w4 s3"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ExpertsSpec("float64", None, "gelu(x)", False), UnsupportedSpecError),
        (lambda: ExpertsSpec("float32", None, "gelu(x)", True), UnsupportedSpecError),
        (lambda: ExpertsSpec("float32", None, "open(x)", False), ExpressionError),
        (lambda: ExpertsSpec("float32", None, "to(silu(gate), 'bfloat16') * up", True), UnsupportedSpecError),
        (lambda: KernelSpec("back", PLAIN, TILE), UnsupportedSpecError),
        (lambda: KernelSpec("back", SPEC, Tile(32, 16, 64, 4, 3)), UnsupportedSpecError),
        (lambda: Pattern(3, 4, 32), UnsupportedSpecError),
        (lambda: Pattern(1, 2, 24), UnsupportedSpecError),
        (lambda: Tile(24, 16, 16, 4, 2), UnsupportedSpecError),
        (lambda: Tile(16, 8, 16, 4, 2), UnsupportedSpecError),
        (lambda: KernelSpec("gate", SPEC, TILE), UnsupportedSpecError),
        (lambda: KernelSpec("up", SPEC, Tile(32, 16, 64, 4, 3)), UnsupportedSpecError),
    ],
)
def test_refused(make, error):
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("pattern", [Pattern(1, 2, 32), Pattern(2, 4, 32), Pattern(1, 2, 32, 16), Pattern(2, 4, 32, 3)])
def test_index_formulas(pattern):
    """The text, evaluated, against counting."""
    n, m, group = pattern.n, pattern.m, pattern.group
    for first in (0, 5):
        text = selection_row(pattern, "row", "first")
        expected = [(b + first) // group * n + j for b in range(50) for j in range(n)]
        assert [eval(text, {"row": row, "first": first}) for row in range(50 * n)] == expected
    assert [eval(block_row(pattern, "row"), {"row": row}) for row in range(40)] == [row // n * m for row in range(40)]
    text = stored_rows(pattern, "rows")
    assert [eval(text, {"rows": rows}) for rows in range(40)] == [-(-rows // m) * n for rows in range(40)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(1, 2, 16)], ids=str)
def test_choice_of_tiles(dtype, pattern):
    """As few passes over the weights as there can be, and no larger a tile than that needs."""
    spec = ExpertsSpec(dtype, pattern, ACTIVATION, True)
    found = candidates(spec)
    sizes = [tiles.slots for tiles in found]
    assert sizes == sorted(set(sizes)) and all(t.up.slots == t.down.slots for t in found)
    for slots in (0, 1, 8, 128, 256, 2048, 100_000):
        mean, chosen = max(1, -(-slots // 8)), choose(spec, slots, 8)
        passes = [-(-mean // size) for size in sizes]
        assert -(-mean // chosen.slots) == min(passes)
        assert chosen.slots == min(s for s, p in zip(sizes, passes, strict=True) if p == min(passes))
    assert {k.tile for k in kernels(spec)} == {t for tiles in found for t in (tiles.up, tiles.down)}
    if pattern is not None:
        assert [choose_back(spec, slots, 8) for slots in (0, 8 * 16)] == [backs(spec)[0]] * 2
        assert choose_back(spec, 100_000, 8) == backs(spec)[-1]
