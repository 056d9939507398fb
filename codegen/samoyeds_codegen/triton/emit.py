"""The text of a kernel: its tile as constants, the functions it calls, and the projection, out of ``templates/``."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from string import Template

from samoyeds_codegen import expr
from samoyeds_codegen.triton.activation import called, to_triton
from samoyeds_codegen.triton.spec import KernelSpec, Pattern

TEMPLATES = Path(__file__).parent / "templates"
TABLE_WIDTH = 128
"""Numbers that one launch writes."""
TABLE_LINE = 4
SECTIONS = ("parameters", "setup", "step", "finish")
PARTS = ("weight", "values", "metadata", "selection")
"""What weights are stored as."""
_GATHER = (
    "x_row = slot",
    "if ORDER is not None:",
    "    x_row = tl.load(ORDER + slot, mask=slot_live, other=0) // top_k",
)
_HEAD = '"""Samoyeds {title}.\n\nGenerated, do not edit.\n"""\n\nimport triton\nimport triton.language as tl'


def emit(spec: KernelSpec) -> str:
    """Triton of one projection, a function ``project``; the same text for the same specification."""
    constants = {"ROWS": spec.tile.rows, "SLOTS": spec.tile.slots, "COLS": spec.tile.cols}
    if spec.experts.pattern is not None:
        constants["VECTOR"] = spec.experts.pattern.vector
    lines = "\n".join(f"{name} = tl.constexpr({value})" for name, value in constants.items())
    body = _back(spec) if spec.op == "back" else _project(spec)
    return _file(str(spec), [lines, *_functions(spec), body])


def emit_plan() -> str:
    """Triton of what is the same for all experts: ``tiles``, the work list, ``gather``, and ``combine``."""
    return _file("plan: work list, gather and weighted sum", [template(t) for t in ("tiles", "gather", "combine")])


def emit_table() -> str:
    """Triton of ``table``, which writes its arguments into memory."""
    names = [f"number_{i}" for i in range(TABLE_WIDTH)]
    lines = [names[i : i + TABLE_LINE] for i in range(0, TABLE_WIDTH, TABLE_LINE)]
    holes = {
        "width": str(TABLE_WIDTH),
        "parameters": "\n".join(f"    {' '.join(f'{name}: tl.int64,' for name in line)}" for line in lines),
        "stores": "\n".join(f"    tl.store(TABLE + {i}, {name})" for i, name in enumerate(names)),
    }
    return _file("table: numbers into memory", [Template(template("table")).substitute(holes)])


def emit_gradients() -> str:
    """Triton of ``outer``, the gradient of a weight; that of rows is a projection."""
    return _file("gradients: of the weights of a projection", [template("product"), template("outer")])


@functools.cache
def template(name: str) -> str:
    """The text of a file in ``templates/``."""
    return (TEMPLATES / f"{name}.txt").read_text().strip()


def _file(title: str, parts: list[str]) -> str:
    return "\n\n\n".join([_HEAD.format(title=title), *parts]) + "\n"


def _project(spec: KernelSpec) -> str:
    from samoyeds_codegen.triton.index import stored_rows  # sympy takes long to import

    pattern, gather = spec.experts.pattern, spec.op == "up"
    sections = _sections(spec)
    operand = "X [T, cols] are tokens, ORDER [S] where each slot stands among the ids; without it X [S, cols] is rows."
    names = {
        "out_rows": spec.outputs,
        "slots": spec.tile.slots,
        "operand": operand if gather else "X [S, cols] is in slot order; ORDER and top_k are not read.",
        "gather": "\n    ".join(_GATHER) if gather else "x_row = slot",
        "stored_rows": stored_rows(pattern, "rows"),
        "result": f"activate({', '.join(spec.sides)})" if gather else "down",
    }
    return Template(template("project")).substitute(names | sections)


def _back(spec: KernelSpec) -> str:
    """Multiplies by the weight itself: sub-rows are chosen along the sum."""
    from samoyeds_codegen.triton.index import block_row, selection_row, stored_rows

    pattern = spec.experts.pattern
    assert pattern is not None
    places = _places("back", spec.experts.separate)
    names = places | {
        "gather": "\n    ".join(_GATHER),
        "stored_rows": stored_rows(pattern, "rows"),
        "block": block_row(pattern, "row"),
        "selection_row": selection_row(pattern, "row", "back_first_block"),
    }
    parts = _split(template("back_selected" if pattern.selects else "back_whole"))
    sections = {name: Template(text).substitute(names) for name, text in parts.items()}
    more = f"\n{sections['parameters']}" if "parameters" in sections else ""
    return Template(template("back")).substitute(names | sections | {"parameters": more})


def _sections(spec: KernelSpec) -> dict[str, str]:
    """What each side adds to the sections of the projection."""
    pattern = spec.experts.pattern
    stored = [] if pattern is None else ["    stored = tl.cdiv(cols, VECTOR) * VECTOR"]
    found: dict[str, list[str]] = {name: [] for name in SECTIONS} | {"setup": stored}
    for side in spec.sides:
        names = {"side": side, "SIDE": side.upper()}
        names |= _places(side, spec.experts.separate) | _selected(pattern, side)
        for part in _parts(pattern):
            for name, text in _split(template(part)).items():
                found[name].append(Template(text).substitute(names))
    return {name: "\n".join(texts) for name, texts in found.items()}


def _places(side: str, separate: bool) -> dict[str, str]:
    """Where an expert's part of each operand begins: by a stride of a stack, or by a table of matrices."""
    found = {}
    for part in PARTS:
        name = side if part == "weight" else f"{side}_{part}"
        if separate:
            found[f"where_{part}"] = f"{name.upper()}_TABLE, {name}_unit: tl.constexpr"
            found[f"begin_{part}"] = f"tl.load({name.upper()}_TABLE + expert) * {name}_unit"
        else:
            found[f"where_{part}"], found[f"begin_{part}"] = f"{name}_expert", f"expert * {name}_expert"
    return found


def _parts(pattern: Pattern | None) -> list[str]:
    if pattern is None:
        return ["dense_side", "bias"]
    return ["packed_side", "selected_side" if pattern.selects else "whole_side", "bias"]


def _split(text: str) -> dict[str, str]:
    """The sections of a template, each after its name in brackets."""
    _, *pieces = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)
    return {name: body.rstrip("\n") for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


def _selected(pattern: Pattern | None, side: str) -> dict[str, str]:
    """One sum for each sub-row of a block: of n condensed rows, those that hold it."""
    if pattern is None or not pattern.selects:
        return {}
    from samoyeds_codegen.triton.index import selection_row

    sums = [f"{side}_{sub_row}" for sub_row in range(pattern.m)]
    zeros = [f"    {name} = tl.zeros((ROWS, SLOTS), tl.float32)" for name in sums]
    adds = [f"        {name} += tl.where({side}_choice == {i}, {side}_p, 0.0)" for i, name in enumerate(sums)]
    blocks = sums if pattern.n == 1 else [f"pairs({name})" for name in sums]
    return {
        "selection_row": selection_row(pattern, "row", f"{side}_first_block"),
        "zeros": "\n".join(zeros),
        "sums": "\n".join(adds),
        "interleaved": _interleaved(blocks),
    }


def _interleaved(blocks: list[str]) -> str:
    """Rows of several tiles in turn, by halves: the even ones and the odd ones first."""
    if len(blocks) == 1:
        return blocks[0]
    return f"interleave({_interleaved(blocks[::2])}, {_interleaved(blocks[1::2])})"


# ------------------------------------------------------------------------------------------------------- functions


def _functions(spec: KernelSpec) -> list[str]:
    """The functions that a projection calls, and no others."""
    pattern = spec.experts.pattern
    packed = [] if pattern is None else [template("unpack")]
    selects = pattern is not None and pattern.selects
    pairs = [template("pairs")] if pattern is not None and pattern.n == 2 else []
    if spec.op == "back":
        return [template("place"), *packed, template("product")]
    helpers = [*packed, *pairs, *([template("interleave")] if selects else []), template("product")]
    return [template("place"), *helpers, *(_activate(spec) if spec.op == "up" else [])]


def _activate(spec: KernelSpec) -> list[str]:
    text, names = spec.experts.activation, expr.GATED_NAMES if spec.experts.gated else (expr.PLAIN_NAME,)
    body = to_triton(text)
    function = f"@triton.jit\ndef activate({', '.join(names)}):\n    # {text}\n    return {body}"
    return [*activation_functions(body), function]


def activation_functions(text: str) -> list[str]:
    """The text of the functions that a printed expression calls, in the order of their file."""
    known, needed = _known(), set()
    waiting = list(called(text))
    while waiting:
        name = waiting.pop()
        if name in known and name not in needed:
            needed.add(name)
            waiting += called(known[name])
    return [body for name, body in known.items() if name in needed]


@functools.cache
def _known() -> dict[str, str]:
    """The functions of ``templates/functions.txt`` by name."""
    text = template("functions")
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        assert isinstance(node, ast.FunctionDef)
        found[node.name] = "\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
    return found
