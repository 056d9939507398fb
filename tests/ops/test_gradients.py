"""`torch.autograd.gradcheck` in float64 for every op that has a derivative, and what is frozen.

An op that is new and in none of the lists fails a test, so none is forgotten.
"""

import itertools

import pytest
import torch

from samoyeds_compile.layout.algebra import Layout
from samoyeds_compile.ops import token_products
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, best_mask
from tests.ops.operands import floating, leaves_of, operands, randn, results

OPS = torch.ops.samoyeds
F64 = torch.float64
IDS = torch.tensor([[0, 3], [1, 0], [2, 2], [0, -1]])
"""With an expert named twice, one of sentinels' and one without rows (4 of 5)."""
NO_DERIVATIVE = {
    "route": "integers",
    "count_slots": "integers, and no result",
    "unpack": "packed weights are not trained; masters are",
    "gpu_experts": "has no float64; interpreted_training.py compares its derivative with one",
    "gpu_experts_backward": "is the derivative of gpu_experts",
    "packed_grouped_mm": "has its derivative in PackedTensor",
    **dict.fromkeys(
        ("choose_experts", "sparse_experts", "dense_experts"),
        "kernels for inference, never lowered to otherwise",
    ),
}
"""Ops, and why not."""
ELSEWHERE = {"router", "leaf", "leaf_backward"}
"""Ops whose gradients are tested in test_router.py and test_leaf.py; the last two come with integrations."""


def block(layout="concatenated", **kwargs):
    args = operands(6, 4, 2, 5, 6, 4, layout, "out_in", True, F64, **kwargs)
    args[1] = IDS
    return args


def canonical(op, **kwargs):
    return lambda: (lambda *a: op(*a, F64, None), block(**kwargs))


def stage_operands(separate=""):
    x, _, w, gate, up, down, _, up_bias, down_bias, *tail, _ = block(separate=separate)
    h = randn(torch.Generator().manual_seed(1), F64, 8, 4)
    return x, w, gate, up, down, up_bias, down_bias, tail, h, OPS.route(IDS, 5)


def up(separate):
    x, w, gate, up, _, bias, _, tail, _, plan = stage_operands(separate)
    owned = int(plan[3][-1])
    return lambda x, w, up, bias: OPS.expert_up(x, *plan, gate, up, None, bias, w, *tail, F64)[:owned], [x, w, up, bias]


def down(separate):
    _, w, _, _, down, _, bias, _, h, plan = stage_operands(separate)
    return lambda h, w, down, bias: OPS.expert_down(h, *plan, down, bias, w, "out_in", F64, None), [h, w, down, bias]


def project():
    *_, down, _, bias, _, h, (_, _, expert, offsets) = stage_operands()
    owned = int(offsets[-1])
    return lambda h, down, bias: OPS.expert_project(h, expert, offsets, down, bias, "out_in", F64)[:owned], [
        h,
        down,
        bias,
    ]


def combine():
    """Of rows that somebody owns; what others get is undefined."""
    w, h, (order, slot, _, offsets) = (stage_operands()[i] for i in (1, 8, 9))
    owned = int(offsets[-1])
    nobody = h.new_zeros(8 - owned, 4)
    return lambda y, w: OPS.combine(torch.cat([y, nobody]), order, slot, offsets, w, None), [h[:owned], w]


def linear():
    *_, h, (_, _, _, offsets) = stage_operands()
    owned, weight = int(offsets[-1]), randn(torch.Generator().manual_seed(2), F64, 5, 3, 4)
    return lambda x, weight: OPS.expert_linear(x, [weight], offsets, False)[:owned], [h, weight]


def outer():
    *_, h, (_, _, _, offsets) = stage_operands()
    grad = randn(torch.Generator().manual_seed(2), F64, 8, 3)
    return lambda x, grad: OPS.expert_outer(x, grad, offsets, False), [h, grad]


def token_linear():
    order, slot, _, offsets = stage_operands()[9]
    g, owned = torch.Generator().manual_seed(2), int(offsets[-1])
    x, weight = randn(g, F64, 4, 6), randn(g, F64, 5, 3, 6)
    return lambda x, weight: OPS.token_linear(x, order, slot, [weight], offsets, False)[:owned], [x, weight]


def token_outer():
    order, slot, _, offsets = stage_operands()[9]
    g = torch.Generator().manual_seed(2)
    args = [randn(g, F64, 4, 6), randn(g, F64, 8, 3)]
    return lambda x, grad: OPS.token_outer(x, order, slot, grad, offsets, True), args


def in_range():
    """Both ops: what begins the range of a profiler, and what ends it."""
    x = randn(torch.Generator().manual_seed(3), F64, 4, 6)

    def run(x):
        copy, handle = OPS.range_enter(x, "block")
        return OPS.range_exit(copy, handle)

    return run, [x]


def layout(target):
    """Of a plan without slots of nobody, which give no gradients."""
    plan, x = OPS.route(IDS.clamp(min=0), 5), randn(torch.Generator().manual_seed(3), F64, 4, 6)
    source, after = Layout(dtype=F64), Layout("slots", *target, dtype=F64)
    return lambda x: OPS.convert_layout(x, *plan, source.name, after.name), [x]


def batched():
    _, _, gate, up, down, up_bias, down_bias, tail, *_ = stage_operands()
    x = randn(torch.Generator().manual_seed(3), F64, 5, 2, 6)
    return (
        lambda x, up, down, *biases: OPS.experts_batched(x, gate, up, down, None, *biases, *tail, F64, None),
        [x, up, down, up_bias, down_bias],
    )


def sorted_rows():
    offsets, layout = torch.tensor([2, 2, 3, 3, 7], dtype=torch.int32), ("silu(gate) * up", "separate", "out_in")
    g = torch.Generator().manual_seed(4)
    args = [randn(g, F64, *shape) for shape in ((7, 6), (5, 4, 6), (5, 4, 6), (5, 6, 4))]
    return lambda x, gate, up, down: OPS.experts_sorted(x, offsets, [gate], [up], [down], *layout, F64, None), args


def packed():
    """By all but the packed weights."""
    config = SparsityConfig(1, 1, 16)
    args = operands(6, 4, 2, 5, 16, 16, "concatenated", "out_in", True, F64)
    stacks = [weights and [_packed(weights[0], config)] for weights in args[3:6]]
    return lambda x, ids, w, *biases: OPS.experts_packed(x, ids, w, *stacks, *biases, *args[9:], F64, None), [
        args[0], IDS, args[2], *args[6:9]
    ]  # fmt: skip


def _packed(weight, config):
    return PackedTensor.from_dense(weight * best_mask(weight.abs(), config), config)


CASES = {
    "moe_experts": canonical(OPS.moe_experts),
    "moe_experts matrices": canonical(OPS.moe_experts, layout="separate", separate="gate,up,down"),
    "moe_experts plain": canonical(OPS.moe_experts, layout="none"),
    "moe_experts input": canonical(OPS.moe_experts, weighting="input"),
    "experts_gathered": canonical(OPS.experts_gathered),
    "experts_dense": canonical(OPS.experts_dense),
    "experts_gpu": canonical(OPS.experts_gpu),
    "experts_packed": packed,
    "experts_batched": batched,
    "experts_sorted": sorted_rows,
    "expert_up": lambda: up(""),
    "expert_up matrices": lambda: up("up"),
    "expert_down": lambda: down(""),
    "expert_down matrices": lambda: down("down"),
    "expert_project": project,
    "combine": combine,
    "expert_linear": linear,
    "expert_outer": outer,
    "token_linear": token_linear,
    "token_outer": token_outer,
    "range_enter": in_range,
    "range_exit": in_range,
    "convert_layout": lambda: layout(()),
    "convert_layout pairs": lambda: layout(("feature", "pairs", 4)),
}


def test_every_op_is_in_a_list():
    prefix = "samoyeds::"
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    names = {name.removesuffix("_loading") for name in names}
    assert names | ELSEWHERE == {case.split()[0] for case in CASES} | NO_DERIVATIVE.keys() | ELSEWHERE


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    function, args = CASES[case]()
    leaves = leaves_of(args)
    inputs = floating(leaves)

    def of_tensors(*tensors):
        new = {id(old): tensor for old, tensor in zip(inputs, tensors, strict=True)}
        return function(*torch.utils._pytree.tree_map(lambda a: new.get(id(a), a), leaves))

    assert torch.autograd.gradcheck(of_tensors, inputs)


@pytest.mark.parametrize("case", [token_linear, token_outer])
def test_opcheck(case):
    order, slot, _, offsets = stage_operands()[9]
    x, other = leaves_of(case()[1])
    if case is token_linear:
        torch.library.opcheck(OPS.token_linear.default, (x, order, slot, [other], offsets, False))
    else:
        torch.library.opcheck(OPS.token_outer.default, (x, order, slot, other, offsets, True))


TRAINED = {"router": (2,), "experts": (3, 4, 5, 6, 7, 8), "down": (5,), "biases": (7, 8), "attention": (0,)}
"""Operands of `moe_experts` that get gradients; LoRA beside frozen experts is ``attention``."""


@pytest.mark.parametrize("separate", ["", "up,down"], ids=["stack", "matrices"])
@pytest.mark.parametrize("trained", TRAINED)
def test_frozen_operands(trained, separate):
    """What is trained gets the gradient that it gets if all is trained; what is not costs no product."""
    args = block(separate=separate)
    _, *expected = results(lambda a: OPS.moe_experts(*a, F64, None), args)
    frozen = [leaves_of([a], requires_grad=i in TRAINED[trained])[0] for i, a in enumerate(args)]
    out = OPS.moe_experts(*frozen, F64, None)
    weight = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape)
    with torch.profiler.profile() as profile:
        out.backward(weight)
    for leaf, grad in zip(floating(frozen), expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, grad)
    calls = {event.key: event.count for event in profile.key_averages()}
    outers = {"router": 0, "experts": 4, "down": 1, "biases": 2, "attention": 0}
    assert sum(calls.get(f"samoyeds::{op}", 0) for op in ("expert_outer", "token_outer")) == outers[trained]


def test_projected_rows_are_not_kept():
    """The gradient of the routing weights is computed without them: [S, H] is the largest of the activations."""
    function, args = down("")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        function(*leaves_of(args))
    assert torch.Size([8, 4]) in saved and torch.Size([8, 6]) not in saved


def test_tokens_are_kept_and_not_a_row_for_each_of_their_experts():
    function, args = up("")
    plain, saved = args[:1] + args[2:], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        (lambda x, *more: function(x, None, *more))(*leaves_of(plain))
    assert torch.Size([4, 6]) in saved and torch.Size([8, 6]) not in saved


@pytest.mark.parametrize("separate", [False, True], ids=["stack", "matrices"])
@pytest.mark.parametrize("in_out", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tokens_gathered_an_expert_at_a_time(dtype, in_out, separate, monkeypatch):
    """The same as with all rows gathered at once: sentinels, an expert without rows, long runs."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 4, (150, 2), generator=g)
    ids[ids == 2] = 7
    order, slot, _, offsets = OPS.route(ids, 4)
    x, grad = randn(g, dtype, 150, 24), randn(g, dtype, 300, 16)
    weight = randn(g, dtype, 4, *((24, 16) if in_out else (16, 24)))
    weights, rows = list(weight.unbind()) if separate else [weight], x[order // 2]

    def both():
        linear = OPS.token_linear(x, order, slot, weights, offsets, in_out)
        return linear[: int(offsets[-1])], OPS.token_outer(x, order, slot, grad, offsets, in_out)

    at_once = OPS.expert_linear(rows, weights, offsets, in_out), OPS.expert_outer(rows, grad, offsets, in_out)
    monkeypatch.setattr(token_products, "_AT_ONCE", 0)
    for mine, theirs in zip(both(), (at_once[0][: int(offsets[-1])], at_once[1]), strict=True):
        torch.testing.assert_close(mine, theirs)


RUNS = (70, 0, 130, 65, 3, 97)
"""Rows of experts; most are no multiple of what long runs are taken in."""


@pytest.mark.parametrize("separate", [False, True], ids=["stack", "matrices"])
@pytest.mark.parametrize(("dtype", "after"), list(itertools.product([torch.bfloat16, torch.float16], [0, 5, 40])))
def test_long_runs(dtype, after, separate):
    """Runs go on into rows of others, NaN among them, and the last one into nobody's or is cut."""
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor(RUNS).cumsum(0).to(torch.int32)
    end = int(offsets[-1])
    x, grad = randn(g, dtype, end + after, 24), randn(g, dtype, end + after, 16)
    x[end:] = grad[end:] = x[0] = float("nan")
    weight = randn(g, dtype, 6, 16, 24)
    y = OPS.expert_linear(x, list(weight.unbind()) if separate else [weight], offsets, False)
    x[0] = 0
    outer = OPS.expert_outer(x, grad, offsets, False)
    assert y[0].isnan().all() and y[end:].eq(0).all()
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        rows, grads = x[start:stop].double(), grad[start:stop].double()
        first = 1 if expert == 0 else 0
        expected = (rows @ weight[expert].double().t())[first:]
        torch.testing.assert_close(y[start:stop].double()[first:], expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(outer[expert].double(), grads.t() @ rows, rtol=1e-2, atol=2e-2)
        start = stop
