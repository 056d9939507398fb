"""Gradients in Triton's interpreter against autograd in float64. Run by test_interpreter.py."""

import pytest
import torch

from samoyeds_codegen.triton.gradients import row_gradient, weight_gradient
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.route import route
from samoyeds_compile.sparsity import SparsityConfig, best_mask

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
    row_gradient(grad, weight, plan.offsets_E, rows)
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
