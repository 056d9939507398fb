"""Kernels prove themselves on a device, here the CPU of Triton's interpreter. Run by test_interpreter.py."""

from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.triton.emit import emit
from samoyeds_codegen.triton.gradients import plain, weight_gradient
from samoyeds_codegen.triton.kernel import Projection
from samoyeds_codegen.triton.prove import prove
from samoyeds_codegen.triton.prove_gradients import prove_gradients
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import Pattern
from tests.codegen.triton.cases import spec_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("form", [Form(), Form(False, True, True, True)], ids=["aligned", "ragged"])
@pytest.mark.parametrize("pattern", [None, Pattern(1, 1, 32), Pattern(1, 2, 32, 16), Pattern(2, 4, 32)], ids=str)
def test_right_kernels_are_proven(pattern, form):
    assert prove(spec_of("float32", pattern), form, CPU) == ""


@pytest.mark.parametrize("pattern", [None, Pattern(1, 2, 32)], ids=str)
@pytest.mark.parametrize("form", [Form(), Form(False, True, True, True)], ids=["aligned", "ragged"])
def test_matrices_that_lie_apart_are_proven(form, pattern):
    """And a table that is read wrongly is refused."""
    spec = replace(spec_of("float32", pattern), separate=True)
    assert prove(spec, form, CPU) == "" == prove_gradients(plain(spec), form, CPU)

    def load(kernel):
        return Projection(kernel, emit(kernel).replace("_TABLE + expert", "_TABLE + 0 * expert"))

    assert f"up float32 {pattern or 'dense'} matrices" in prove(spec, form, CPU, load)


def test_half_precision_is_proven():
    assert prove(spec_of("bfloat16", Pattern(1, 2, 64)), Form(), CPU) == ""
    assert prove(spec_of("bfloat16", Pattern(1, 2, 128, 64)), Form(), CPU) == ""
    assert prove(spec_of("float16", None, "to(gelu(x), 'float16')"), Form(), CPU) == ""


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("two == 3", "two == 2"),
        ("mask=out_live[:, None] & slot_live[None, :]", "mask=out_live[:, None]"),
        ("mask=out_live[:, None] & slot_live[None, :]", "mask=slot_live[None, :]"),
        ("(k + col < cols)", "(k + col < 0)"),
        ("k // VECTOR", "0"),
        ("= activate(gate, up)", "= activate(up, gate)"),
        ("// top_k", "// (top_k + 1)"),
    ],
)
def test_wrong_kernels_are_refused(wrong, right):
    """A planted error, in the text of those kernels that have the place."""

    def load(spec):
        text = emit(spec).replace("col_live = k + col < cols", "col_live = (k + col < cols)")
        return Projection(spec, text.replace(wrong, right))

    assert "up float32" in prove(spec_of("float32", Pattern(1, 2, 32)), Form(), CPU, load)


def test_a_wrong_group_is_refused():
    """All blocks take the choices of the first group."""
    pattern = Pattern(1, 2, 128, 64)

    def load(spec):
        return Projection(spec, emit(spec).replace("(row + up_first_block) // 64", "0 * row"))

    assert "up float32" in prove(spec_of("float32", pattern), Form(), CPU, load)


def test_what_raises_is_refused():
    def load(spec):
        return Projection(spec, emit(spec).replace("tl.dot(", "tl.no_such_thing("))

    reason = prove(spec_of(), Form(), CPU, load)
    assert "do not run on cpu" in reason and "no_such_thing" in reason


@pytest.mark.parametrize("form", [Form(), Form(False, True, True, True)], ids=["aligned", "ragged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_gradients_are_proven(dtype, form):
    assert prove_gradients(plain(spec_of(dtype)), form, CPU) == ""


@pytest.mark.parametrize("wrong", ["twice", "beyond", "nobody's", "raises"])
def test_wrong_gradients_are_refused(wrong):
    def outer(grad, x, order, top_k, offsets, mask, out):
        if wrong == "raises":
            raise RuntimeError("no_such_thing")
        offsets = offsets + (offsets == offsets[-1]).int() if wrong == "nobody's" else offsets
        weight_gradient(grad, x, order, top_k, offsets, mask, out)
        if wrong == "twice":
            out *= 2
        if wrong == "beyond":
            torch.as_strided(out, (1,), (1,), out.storage_offset() + out.untyped_storage().nbytes() // 4 - 1).zero_()

    assert "gradient" in prove_gradients(plain(spec_of("float32")), Form(), CPU, outer=outer)


@pytest.mark.parametrize("form", [Form(), Form(False, bias=True)], ids=["aligned", "ragged"])
@pytest.mark.parametrize("pattern", [Pattern(1, 1, 32), Pattern(1, 2, 32, 16), Pattern(2, 4, 32)], ids=str)
def test_gradients_beside_packed_weights_are_proven(pattern, form):
    assert prove_gradients(plain(spec_of("float32", pattern)), form, CPU) == ""


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("+ choice.to(tl.int32)", ""),
        ("first_col // VECTOR", "0"),
        ("& (col < cols)[None, :]", ""),
        ("mask=slot_live[:, None] & (col < cols)", "mask=(col < cols)"),
        ("(feature < rows)", "(feature < rows - 1)"),
    ],
)
def test_wrong_kernels_that_go_back_are_refused(wrong, right):
    def load(spec):
        return Projection(spec, emit(spec).replace(wrong, right) if spec.op == "back" else None)

    assert "back float32" in prove_gradients(plain(spec_of("float32", Pattern(1, 2, 32))), Form(), CPU, load)
