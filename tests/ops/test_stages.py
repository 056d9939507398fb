"""The stage ops and the products of all experts against their twins, and `torch.library.opcheck` on each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_compile.ops import reference

ids_strategy = st.integers(0, 9).flatmap(
    lambda t: st.integers(1, 4).flatmap(
        lambda k: st.lists(st.lists(st.integers(-2, 8), min_size=k, max_size=k), min_size=t, max_size=t).map(
            lambda rows: torch.tensor(rows, dtype=torch.int64).view(t, k)
        )
    )
)


@settings(max_examples=200, deadline=None)
@given(ids=ids_strategy, num_experts=st.integers(1, 8), dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]))
def test_route(ids, num_experts, dtype):
    plan = torch.ops.samoyeds.route(ids.to(dtype), num_experts)
    for mine, theirs in zip(plan, reference.route(ids, num_experts), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def rows(seed, num_experts, per_expert, width, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, per_expert + 1, (num_experts,), generator=g)
    offsets = counts.cumsum(0).to(torch.int32)
    return torch.randn(int(counts.sum()) + 2, width, generator=g).to(dtype), offsets, g


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("per_expert", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_linear_and_outer(dtype, per_expert, in_out):
    x, offsets, g = rows(0, 6, per_expert, 16, dtype)
    weight = torch.randn(*((6, 16, 24) if in_out else (6, 24, 16)), generator=g).to(dtype)
    grad = torch.randn(x.shape[0], 24, generator=g).to(dtype)
    ops = torch.ops.samoyeds
    tolerance = {"rtol": 5e-2, "atol": 5e-1} if dtype in (torch.bfloat16, torch.float16) else {}
    linear = reference.expert_linear(x.double(), weight.double(), offsets, in_out).to(dtype)
    outer = reference.expert_outer(x.double(), grad.double(), offsets, in_out).to(dtype)
    torch.testing.assert_close(ops.expert_linear(x, weight, offsets, in_out), linear, **tolerance)
    torch.testing.assert_close(ops.expert_outer(x, grad, offsets, in_out), outer, **tolerance)


@pytest.mark.parametrize("in_out", [False, True])
def test_opcheck_products(in_out):
    x, offsets, _ = rows(1, 4, 5, 8)
    x.requires_grad_()
    weight = torch.randn(*((4, 8, 12) if in_out else (4, 12, 8)), requires_grad=True)
    grad = torch.randn(x.shape[0], 12, requires_grad=True)
    torch.library.opcheck(torch.ops.samoyeds.expert_linear.default, (x, weight, offsets, in_out))
    torch.library.opcheck(torch.ops.samoyeds.expert_outer.default, (x, grad, offsets, in_out))


def test_opcheck_stages():
    ids = torch.randint(0, 5, (6, 2))
    ops = torch.ops.samoyeds
    torch.library.opcheck(ops.route.default, (ids, 4))
    plan = ops.route(ids, 4)
    x, w = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    up, bias = torch.randn(4, 12, 8, requires_grad=True), torch.randn(4, 12, requires_grad=True)
    down = torch.randn(4, 8, 6, requires_grad=True)
    up_args = (x, *plan, None, up, None, bias, "silu(gate) * up", "concatenated", "out_in", torch.float32)
    torch.library.opcheck(ops.expert_up.default, up_args)
    h = ops.expert_up(*up_args).detach().requires_grad_()
    torch.library.opcheck(ops.expert_down.default, (h, *plan, down, None, w, "out_in", torch.float32, None))
    y = ops.expert_down(h, *plan, down, None, None, "out_in", torch.float32, None).detach().requires_grad_()
    order, slot, _, offsets = plan
    torch.library.opcheck(ops.combine.default, (y, order, slot, offsets, w, None))


def test_frozen_weights_get_no_gradient():
    """LoRA and frozen experts: the product for a weight's gradient is not computed."""
    x, offsets, _ = rows(2, 4, 5, 8)
    x.requires_grad_()
    weight = torch.randn(4, 12, 8)
    with torch.profiler.profile() as profile:
        torch.ops.samoyeds.expert_linear(x, weight, offsets, False).sum().backward()
    assert not any("expert_outer" in event.key for event in profile.key_averages())
    assert x.grad is not None and weight.grad is None


def test_kernels_ignore_autocast():
    """Casts are decided where the graph is built; under autocast a fp32 product stays fp32."""
    x, offsets, _ = rows(3, 4, 5, 8)
    weight = torch.randn(4, 12, 8)
    plain = torch.ops.samoyeds.expert_linear(x, weight, offsets, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.ops.samoyeds.expert_linear(x, weight, offsets, False), plain)
