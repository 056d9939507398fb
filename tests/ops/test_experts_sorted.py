"""`samoyeds::experts_sorted` against the twin of `moe_experts`: forward, every gradient, no rows."""

import pytest
import torch

from samoyeds_compile.errors import OperandError
from samoyeds_compile.ops import reference
from tests.ops.operands import ACTIVATIONS, assert_close, double, leaves_of, projections, randn, results

COUNTS = {"uneven": (3, 0, 1, 5), "all to the last": (0, 0, 0, 4), "one row": (0, 1, 0, 0), "no rows": (0, 0, 0, 0)}


def operands(counts, layout, weight_layout="out_in", separate="", dtype=torch.float32, h=24, i=16):
    g = torch.Generator().manual_seed(1)
    gate, up, down, *_, activation, layout, weight_layout = projections(
        g, len(counts), h, i, layout, weight_layout, False, dtype=dtype, separate=separate
    )
    offsets = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    return [randn(g, dtype, sum(counts), h), offsets, gate, up, down, activation, layout, weight_layout]


def twin(x, offsets, gate, up, down, *tail):
    """Each row a token of one expert."""
    ids = torch.searchsorted(offsets, torch.arange(len(x)), right=True)[:, None]
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    return reference.moe_experts(x, ids, ones, gate, up, down, None, None, None, *tail, "output")


@pytest.mark.parametrize("separate", ["", "gate,up,down"], ids=["stack", "matrices"])
@pytest.mark.parametrize("weight_layout", ["out_in", "in_out"])
@pytest.mark.parametrize("layout", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_against_float64(counts, dtype, layout, weight_layout, separate):
    args = operands(counts, layout, weight_layout, separate, dtype)
    found = results(lambda a: torch.ops.samoyeds.experts_sorted(*a, dtype, None), args)
    assert_close(found, results(lambda a: twin(*a), double(args)), dtype)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_opcheck(requires_grad):
    args = leaves_of(operands((3, 0, 1, 5), "separate"), requires_grad)
    torch.library.opcheck(torch.ops.samoyeds.experts_sorted.default, (*args, torch.float32, torch.float64))


def test_what_is_refused():
    x, offsets, *rest = operands((1, 2), "none")
    with pytest.raises(OperandError, match=r"experts_sorted: x has rank 3; pass rows as \[R, H\]"):
        torch.ops.samoyeds.experts_sorted(x[None], offsets, *rest, torch.float32, None)
    with pytest.raises(OperandError, match=r"experts_sorted: offsets has dtype torch\.int64"):
        torch.ops.samoyeds.experts_sorted(x, offsets.long(), *rest, torch.float32, None)
