"""Gradients in Triton's interpreter against autograd in float64. Run by test_interpreter.py."""

import pytest
import torch

from samoyeds_codegen.triton.emit import emit
from samoyeds_codegen.triton.gradients import row_gradient, weight_gradient
from samoyeds_codegen.triton.kernel import Projection, work_list
from samoyeds_codegen.triton.operands import DenseSide, PackedSide
from samoyeds_codegen.triton.select import backs
from samoyeds_codegen.triton.spec import Pattern
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.route import route
from samoyeds_compile.sparsity import SparsityConfig, best_mask
from tests.codegen.triton.cases import prune, spec_of

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COUNTS = {"ragged": [0, 3, 41, 1], "nobody": [0, 0], "one": [70]}


def case(counts, dtype, rows=45, cols=70, tokens=None):
    """A plan whose last slots are nobody's, a thinned weight, rows, and a gradient of what they give."""
    experts = len(counts)
    ids = torch.tensor([e for e, n in enumerate(counts) for _ in range(n)] + [-1, experts, -5])
    ids = ids[torch.randperm(len(ids))].view(-1, 1)
    plan = route(ids, experts)
    weight = (torch.randn(experts, rows, cols) / cols**0.5).to(dtype)
    mask = best_mask(weight.float().abs(), SparsityConfig(1, 2, 32))
    x, grad = torch.randn(len(ids), cols).to(dtype), torch.randn(len(ids), rows).to(dtype)
    return plan, weight * mask, mask, x, grad


def expected_of(plan, weight, mask, x_S, grad):
    """By autograd through the reference of the op, with the mask applied to the weight."""
    leaves = [t.double().requires_grad_() for t in (x_S, weight)]
    y = reference.expert_linear(leaves[0], [leaves[1] * mask], plan.offsets_E, False)
    return torch.autograd.grad(y, leaves, grad.double())


def assert_close(found, expected, dtype):
    assert found.isfinite().all()
    assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * max(float(expected.abs().max()), 1e-3)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_gradients(counts, dtype):
    plan, weight, mask, x, grad = case(counts, dtype)
    x_S = x[plan.order_S]
    of_rows, of_weights = expected_of(plan, weight, mask, x_S, grad)
    owned = int(plan.offsets_E[-1])
    rows, weights = torch.full_like(x_S, float("nan")), torch.full_like(weight, float("nan"))
    row_gradient(grad, None, 1, DenseSide(weight), plan.offsets_E, rows)
    assert rows[owned:].isnan().all()
    assert_close(rows[:owned], of_rows[:owned], dtype) if owned else None
    weight_gradient(grad, x_S, None, 1, plan.offsets_E, mask, weights)
    assert_close(weights, of_weights, dtype)
    assert torch.equal(weights[~mask.bool()], torch.zeros_like(weights[~mask.bool()]))


def test_gathered_rows_and_transposed_gradient():
    """As the first projection has them: x are tokens, and the parameter may be [E, in, out]."""
    plan, weight, mask, x, grad = case(COUNTS["ragged"], torch.float32)
    _, expected = expected_of(plan, weight, torch.ones_like(mask), x[plan.order_S], grad)
    out = torch.full((4, 70, 45), float("nan")).mT
    weight_gradient(grad, x, plan.order_S, 1, plan.offsets_E, None, out)
    assert_close(out, expected, torch.float32)
    ids = torch.tensor([[0, 1], [1, -1], [0, 0]])
    plan, tokens, grad = route(ids, 2), torch.randn(3, 20), torch.randn(6, 10)
    _, expected = expected_of(plan, torch.zeros(2, 10, 20), torch.ones(2, 10, 20), tokens[plan.order_S // 2], grad)
    out = torch.full((2, 10, 20), float("nan"))
    weight_gradient(grad, tokens, plan.order_S, 2, plan.offsets_E, None, out)
    assert_close(out, expected, torch.float32)


def test_the_mask_matters():
    plan, weight, mask, x, grad = case(COUNTS["one"], torch.float32)
    with_mask, without = torch.empty_like(weight), torch.empty_like(weight)
    weight_gradient(grad, x, plan.order_S, 1, plan.offsets_E, mask, with_mask)
    weight_gradient(grad, x, plan.order_S, 1, plan.offsets_E, None, without)
    assert torch.equal(with_mask, without * mask) and not torch.equal(with_mask, without)


PATTERNS = [
    Pattern(1, 1, 32), Pattern(1, 2, 32), Pattern(1, 2, 16), Pattern(1, 2, 128), Pattern(2, 4, 64),
    Pattern(1, 2, 32, 16), Pattern(2, 4, 32, 3),
]  # fmt: skip


def packed_case(counts, pattern, dtype, rows, cols=70):
    """A plan, a packed weight as a side and as it is, and gradients of rows of tokens."""
    plan, weight, _, _, grad = case(counts, dtype, rows, cols)
    pruned, packed = prune(weight, pattern)
    return plan, pruned, PackedSide(packed.values, packed.metadata, packed.selection, pattern, rows), grad


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        *((torch.float32, p) for p in PATTERNS),
        *((d, PATTERNS[i]) for d in (torch.float16, torch.bfloat16) for i in (1, 4)),
    ],
    ids=str,
)
def test_rows_of_packed_weights(dtype, pattern, counts):
    """Of tokens by an order, and of slots: the same bits; no size is a multiple of anything, last block included."""
    plan, pruned, side, grad = packed_case(counts, pattern, dtype, rows=90 + 45 % pattern.m)
    owned, grad_S = int(plan.offsets_E[-1]), grad[plan.order_S]
    expected, _ = expected_of(plan, pruned, torch.ones_like(pruned), torch.zeros(len(grad), 70), grad_S)
    found = torch.full((2, len(grad), 70), float("nan"), dtype=dtype)
    row_gradient(grad, plan.order_S, 1, side, plan.offsets_E, found[0])
    row_gradient(grad_S, None, 1, side, plan.offsets_E, found[1])
    assert found[:, owned:].isnan().all() and torch.equal(found[0, :owned], found[1, :owned])
    assert_close(found[0, :owned], expected[:owned], dtype) if owned else None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_kernel_that_goes_back(dtype, pattern):
    """Whatever the number of slots would choose; rows lie apart, and one of them is not finite."""
    spec = spec_of(dtype, pattern)
    plan, pruned, side, grad = packed_case([0, 30, 70], pattern, getattr(torch, dtype), rows=70 + 70 % pattern.m)
    wide = grad.new_full((len(grad), 100), float("nan"))
    wide[:, : grad.shape[1]] = grad
    wide[int(plan.order_S[0])] = float("inf")
    expected, _ = expected_of(plan, pruned, torch.ones_like(pruned), torch.zeros(len(grad), 70), grad[plan.order_S])
    for kernel in backs(spec):
        out = torch.full((len(grad), 70), float("nan"), dtype=grad.dtype)
        tiles = work_list(plan.offsets_E, len(grad), kernel.tile.slots)
        Projection(kernel)(wide[:, : grad.shape[1]], plan.order_S, 1, tiles, {"back": side}, out)
        assert not out[0].isfinite().all()
        assert_close(out[1:100], expected[1:100], getattr(torch, dtype))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("// top_k", "// (top_k + 1)"),
        ("first_col // VECTOR", "0"),
        ("+ choice.to(tl.int32)", ""),
        ("(feature < rows)", "(feature < rows - 1)"),
        ("for first_row in range(0, stored_rows, ROWS)", "for first_row in range(0, stored_rows - ROWS, ROWS)"),
        ("unpack(values, words, row_live, first_col, stored)", "unpack(values, words, row_live, 0, stored)"),
    ],
)
def test_planted_errors_are_seen(wrong, right):
    pattern = Pattern(1, 2, 32)
    plan, pruned, side, grad = packed_case([41, 3], pattern, torch.float32, rows=70)
    expected, _ = expected_of(plan, pruned, torch.ones_like(pruned), torch.zeros(len(grad), 70), grad[plan.order_S])
    (kernel,) = backs(spec_of("float32", pattern))
    text = emit(kernel)
    assert wrong in text
    out, tiles = torch.zeros(len(grad), 70), work_list(plan.offsets_E, len(grad), kernel.tile.slots)
    Projection(kernel, text.replace(wrong, right))(grad, plan.order_S, 1, tiles, {"back": side}, out)
    with pytest.raises(AssertionError):
        assert_close(out[:44], expected[:44], torch.float32)
