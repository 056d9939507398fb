"""Layouts inside kernels: each choice computes the same, and what a choice of order moves it does not change."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.isa import AMX, usable_isas
from samoyeds_codegen.cpp.kernel import ExpertsKernel
from samoyeds_codegen.cpp.layouts import Layouts
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_compile import SparsityConfig
from tests.ops import test_dense_experts as dense
from tests.ops import test_sparse_experts as sparse
from tests.ops.operands import ACTIVATIONS, operands

SWIGLU = ACTIVATIONS["concatenated"]
SPECS = {
    "dense": DenseExpertsSpec("float32", SWIGLU, True),
    "columns": DenseExpertsSpec("float32", SWIGLU, True, by_columns=True),
    "dense bf16": DenseExpertsSpec("bfloat16", SWIGLU, True),
    "packed": ExpertsSpec("float32", 1, 2, 32, 1, SWIGLU, True),
    "packed strips": ExpertsSpec("float32", 1, 2, 32, 1, SWIGLU, True, strips=True),
    "packed strips bf16": ExpertsSpec("bfloat16", 1, 2, 32, 1, SWIGLU, True, strips=True),
}


@functools.cache
def kernel_of(spec: DenseExpertsSpec | ExpertsSpec) -> ExpertsKernel:
    return ExpertsKernel(spec, flags=sparse.FLAGS)


def case(name: str, tokens: int, h: int, i: int) -> tuple[list, list]:
    """Operands as the op takes them, and dense ones for the reference."""
    dtype = getattr(torch, SPECS[name].dtype)
    layout = "in_out" if name == "columns" else "out_in"
    args = operands(tokens, tokens, 2, 4, h, i, "concatenated", layout, False, dtype)
    args[1][tokens // 3 :, 0] = 1  # one expert has many tokens, others few
    if "packed" not in name:
        return args, args
    plain, packed = sparse.packed_operands(args, SparsityConfig(1, 2, 32))
    return packed, plain


def run(spec: DenseExpertsSpec | ExpertsSpec, args: list) -> Tensor:
    return (dense if isinstance(spec, DenseExpertsSpec) else sparse).run(kernel_of(spec), args)


@pytest.mark.parametrize("name", SPECS)
def test_every_layout_computes_the_same(name: str) -> None:
    """Against float64; tiles are the same numbers whether they were written at once or turned later.

    Of 1,500 tokens one expert has more than are computed at a time.
    """
    spec, exact = SPECS[name], AMX in usable_isas(SPECS[name].dtype) or SPECS[name].dtype == "float32"
    shapes = ((64, 32), (160, 96)) if "strips" in name else ((64, 32), (40, 36), (33, 130))
    for tokens, (h, i) in itertools.product((0, 1, 5, 37, 130, 1500), shapes):
        args, plain = case(name, tokens, h, i)
        expected = dense.expected_of(plain)
        for few in (0, 8, 62):
            orders = ("", "x", "h", "xh") if name == "dense" else ("", "xh")
            results = [run(replace(spec, layouts=Layouts.up_to(few, by_rows)), args) for by_rows in orders]
            tolerance = sparse.TOLERANCE[args[0].dtype]
            assert all(dense.error(result, expected) <= tolerance for result in results), (tokens, h, i, few)
            assert not exact or all(torch.equal(results[0], other) for other in results[1:])


def test_rows_of_few_slots_are_gathered() -> None:
    """One expert with one token beside one with all others: its row is one, not one for each token."""
    args = operands(0, 64, 1, 4, 64, 32, "concatenated", "out_in", False)
    args[1].fill_(2)
    args[1][17] = 0
    assert dense.error(run(replace(SPECS["dense"], layouts=Layouts.up_to(8)), args), dense.expected_of(args)) <= 1e-6


def test_threshold_is_no_part_of_the_text() -> None:
    """So that shapes share kernels; orders are."""
    (isa, *_), spec = usable_isas("float32"), SPECS["dense"]
    texts = [
        emit(replace(spec, layouts=layouts), isa)
        for layouts in (Layouts.up_to(1), Layouts.up_to(9), Layouts.up_to(9, "h"))
    ]
    assert texts[0] == texts[1] != texts[2] and "H_BY_ROWS = true" in texts[2]


def test_names() -> None:
    for few, by_rows, most in itertools.product((0, 12), ("", "x", "h", "xh"), (None, 0, 24)):
        layouts = replace(Layouts.up_to(few, by_rows), most=most)
        assert Layouts.named(layouts.name) == layouts and not layouts.keeps_rows(few + 1) and layouts.keeps_rows(few)
        for spec in SPECS.values():
            changed = replace(spec, layouts=layouts)
            assert type(spec).named(changed.name) == changed


@pytest.mark.parametrize("fields", [(-1, ""), (1 << 63, ""), (3, "hx"), (3, "y"), (3, "", -1)])
def test_refused(fields: tuple) -> None:
    with pytest.raises(UnsupportedSpecError, match="pass"):
        Layouts(*fields)
