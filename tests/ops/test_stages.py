"""The stage ops and the products of all experts against their twins, and `torch.library.opcheck` on each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from samoyeds_compile.errors import OperandError
from samoyeds_compile.ops import expert_up as expert_up_module
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.operands import num_experts
from samoyeds_compile.ops.route import route
from tests.ops.operands import assert_close, double, leaves_of, operands, results

OPS = torch.ops.samoyeds

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
    plan = OPS.route(ids.to(dtype), num_experts)
    for mine, theirs in zip(plan, reference.route(ids, num_experts), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def rows(seed, num_experts, per_expert, width, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, per_expert + 1, (num_experts,), generator=g)
    offsets = counts.cumsum(0).to(torch.int32)
    return torch.randn(int(counts.sum()) + 2, width, generator=g).to(dtype), offsets, g


@pytest.mark.parametrize("separate", [False, True], ids=["stack", "matrices"])
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("per_expert", [1, 2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_linear_and_outer(dtype, per_expert, in_out, separate):
    x, offsets, g = rows(0, 6, per_expert, 16, dtype)
    weight = torch.randn(*((6, 16, 24) if in_out else (6, 24, 16)), generator=g).to(dtype)
    grad = torch.randn(x.shape[0], 24, generator=g).to(dtype)
    tolerance = {"rtol": 5e-2, "atol": 5e-1} if dtype in (torch.bfloat16, torch.float16) else {}
    linear = reference.expert_linear(x.double(), [weight.double()], offsets, in_out).to(dtype)
    outer = reference.expert_outer(x.double(), grad.double(), offsets, in_out).to(dtype)
    weights = list(weight.unbind()) if separate else [weight]
    torch.testing.assert_close(OPS.expert_linear(x, weights, offsets, in_out), linear, **tolerance)
    torch.testing.assert_close(OPS.expert_outer(x, grad, offsets, in_out), outer, **tolerance)


@pytest.mark.parametrize("separate", [False, True], ids=["stack", "matrices"])
@pytest.mark.parametrize("in_out", [False, True])
def test_opcheck_products(in_out, separate):
    x, offsets, _ = rows(1, 4, 5, 8)
    x.requires_grad_()
    weight = torch.randn(*((4, 8, 12) if in_out else (4, 12, 8)))
    weights = [w.clone().requires_grad_() for w in (weight.unbind() if separate else [weight])]
    grad = torch.randn(x.shape[0], 12, requires_grad=True)
    torch.library.opcheck(OPS.expert_linear.default, (x, weights, offsets, in_out))
    torch.library.opcheck(OPS.expert_outer.default, (x, grad, offsets, in_out))


@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("frozen", [set(), {0, 2}, {0, 1, 2, 3}], ids=["none", "some", "all"])
def test_derivatives_of_separate_matrices(frozen, in_out):
    """First and second, of the matrices that want one; the expert without rows gets zeros."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(9, 6, generator=g, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([3, 3, 5, 8], dtype=torch.int32)  # and one row of nobody
    shape = (6, 5) if in_out else (5, 6)
    matrices = [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=i not in frozen) for i in range(4)]
    wanted = [m for m in matrices if m.requires_grad]

    def function(x, *tensors):
        given = iter(tensors)
        weights = [next(given) if m.requires_grad else m for m in matrices]
        return OPS.expert_linear(x, weights, offsets, in_out)[:8]

    torch.autograd.gradcheck(function, (x, *wanted))
    torch.autograd.gradgradcheck(function, (x, *wanted))
    function(x, *wanted).sum().backward()
    assert all((m.grad is None) == (i in frozen) for i, m in enumerate(matrices))
    assert 1 in frozen or torch.equal(matrices[1].grad, torch.zeros(shape, dtype=torch.float64))


def test_gradients_of_matrices_alone():
    """Rows that need no gradient: the matrices are not even saved."""
    x, offsets, g = rows(5, 4, 5, 8)
    matrices = [torch.randn(12, 8, generator=g, requires_grad=True) for _ in range(4)]
    OPS.expert_linear(x, matrices, offsets, False).sum().backward()
    grads = reference.expert_outer(x, torch.ones(x.shape[0], 12), offsets, False)
    torch.testing.assert_close(torch.stack([m.grad for m in matrices]), grads)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], "weights is empty"),
        ([torch.zeros(12, 8)] * 3, "offsets has shape"),
        ([torch.zeros(12, 8)] * 3 + [torch.zeros(11, 8)], "weights holds"),
        ([torch.zeros(12)] * 4, "weights holds 4 tensors, the first of rank 1"),
        ([torch.zeros(12, 7)] * 4, "x has shape"),
        ([torch.zeros(4, 12, 7)], "x has shape"),
    ],
)
def test_bad_weights_name_themselves(weights, message):
    x, offsets, _ = rows(6, 4, 5, 8)
    with pytest.raises(OperandError, match=f"expert_linear: {message}"):
        OPS.expert_linear(x, weights, offsets, False)


def test_num_experts():
    assert num_experts([torch.empty(1, 3, 2)]) == 1 and num_experts([torch.empty(7, 3, 2)]) == 7
    assert num_experts([torch.empty(3, 2)]) == 1 and num_experts([torch.empty(3, 2)] * 7) == 7


@pytest.mark.parametrize("separate", ["", "gate,up,down"], ids=["stack", "matrices"])
@pytest.mark.parametrize("weighting", ["output", "input"])
def test_stages(weighting, separate):
    """Every stage against its twin, forward and backward, on the rows that belong to an expert."""
    dtype = torch.float64
    args = operands(7, 7, 2, 4, 10, 6, "separate", "out_in", True, dtype, separate=separate)
    x, ids, w, gate, up, down, gate_bias, up_bias, down_bias, activation, layout, weight_layout, _ = args
    before, after = (w, None) if weighting == "input" else (None, w)
    plan = OPS.route(ids, 4)
    order, slot, expert, offsets = plan
    owned = int(offsets[-1])
    tail = (activation, layout, weight_layout)

    def both(op, twin, inputs):
        assert_close(results(op, inputs), results(twin, double(inputs)), dtype)
        return op(inputs).detach()

    h = both(
        lambda a: OPS.expert_up(a[0], *plan, *a[1:], *tail, dtype)[:owned],
        lambda a: reference.expert_up(a[0], ids, *a[1:], *tail),
        [x, gate, up, gate_bias, up_bias, before],
    )
    nobody = torch.full((ids.numel() - owned, 6), float("nan"), dtype=dtype)
    y = both(
        lambda a: OPS.expert_project(torch.cat([a[0], nobody]), expert, offsets, *a[1:], weight_layout, dtype)[:owned],
        lambda a: reference.expert_project(a[0], ids, *a[1:], weight_layout),
        [h, down, down_bias],
    )
    nobody = torch.full((ids.numel() - owned, 10), float("nan"), dtype=dtype)
    out = both(
        lambda a: OPS.combine(torch.cat([a[0], nobody]), order, slot, offsets, a[1], None),
        lambda a: reference.combine(a[0], ids, 4, a[1]),
        [y, after],
    )
    h = torch.cat([h, torch.zeros(ids.numel() - owned, 6, dtype=dtype)])
    torch.testing.assert_close(OPS.expert_down(h, *plan, down, down_bias, after, weight_layout, dtype, None), out)
    torch.testing.assert_close(reference.moe_experts(*args[:12], weighting), out)


@pytest.mark.parametrize("separate", ["", "up,down"], ids=["stack", "matrices"])
@pytest.mark.parametrize("weighting", ["output", "input"])
def test_opcheck_stages(weighting, separate):
    args = leaves_of(operands(8, 6, 2, 4, 8, 6, "concatenated", "out_in", True, sentinels=False, separate=separate))
    x, ids, w, gate, up, down, _, bias, down_bias, *tail, _ = args
    before, after = (w, None) if weighting == "input" else (None, w)
    torch.library.opcheck(OPS.route.default, (ids, 4))
    plan = OPS.route(ids, 4)
    order, slot, expert, offsets = plan
    up_args = (x, *plan, gate, up, None, bias, before, *tail, torch.float32)
    torch.library.opcheck(OPS.expert_up.default, up_args)
    h = OPS.expert_up(*up_args).detach().requires_grad_()
    torch.library.opcheck(OPS.expert_down.default, (h, *plan, down, down_bias, after, "out_in", torch.float32, None))
    project_args = (h, expert, offsets, down, down_bias, "out_in", torch.float32)
    torch.library.opcheck(OPS.expert_project.default, project_args)
    y = OPS.expert_project(*project_args).detach().requires_grad_()
    torch.library.opcheck(OPS.combine.default, (y, order, slot, offsets, after, None))


@pytest.mark.parametrize("separate", [False, True], ids=["stack", "matrices"])
def test_frozen_weights_get_no_gradient(separate):
    """LoRA and frozen experts: the product for a weight's gradient is not computed."""
    x, offsets, _ = rows(2, 4, 5, 8)
    x.requires_grad_()
    weight = torch.randn(4, 12, 8)
    weights = list(weight.unbind()) if separate else [weight]
    with torch.profiler.profile() as profile:
        OPS.expert_linear(x, weights, offsets, False).sum().backward()
    assert not any("expert_outer" in event.key for event in profile.key_averages())
    assert x.grad is not None and weight.grad is None


def test_kernels_ignore_autocast():
    """Casts are decided where the graph is built; under autocast a fp32 product stays fp32."""
    x, offsets, _ = rows(3, 4, 5, 8)
    weight = torch.randn(4, 12, 8)
    plain = OPS.expert_linear(x, [weight], offsets, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(OPS.expert_linear(x, [weight], offsets, False), plain)


@pytest.mark.parametrize("train", [False, True])
def test_gate_and_up_share_a_gather(train) -> None:
    """Off the CPU: two gathers of the same tokens become one, unless gradients keep tokens in place of rows."""

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.gathers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            rows = func is torch.ops.aten.index.Tensor and args[0].dim() == 2
            self.gathers += rows or func is torch.ops.samoyeds.token_linear.default
            return func(*args, **(kwargs or {}))

    x = torch.empty(6, 8, device="meta", requires_grad=train)
    gate, up = (torch.empty(3, 4, 8, device="meta", requires_grad=train) for _ in range(2))
    plan = [torch.empty(*shape, dtype=torch.int64, device="meta") for shape in ((12,), (6, 2), (12,))]
    plan.append(torch.empty(3, dtype=torch.int32, device="meta"))
    with torch.set_grad_enabled(train), Count() as count:
        h = torch.ops.samoyeds.expert_up(
            x, *plan, [gate], [up], None, None, None, "silu(gate) * up", "separate", "out_in", torch.float32
        )
    assert h.shape == (12, 4) and count.gathers == (2 if train else 1)


def test_shared_gather_computes_the_same(monkeypatch) -> None:
    """Where it is taken on the CPU too; rows of nobody are left out of the comparison."""
    ids, x = torch.tensor([[0, 2], [2, -1], [1, 0]]), torch.randn(3, 8)
    plan, gate, up = route(ids, 3), torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    rest = ([gate], [up], None, None, None, "silu(gate) * up", "separate", "out_in", torch.float32)
    with torch.no_grad():
        expected = torch.ops.samoyeds.expert_up(x, *plan, *rest)
        monkeypatch.setattr(expert_up_module, "shares", lambda device: True)
        found = torch.ops.samoyeds.expert_up(x, *plan, *rest)
    torch.testing.assert_close(found[:5], expected[:5])
