"""Gradients of `samoyeds::experts_gpu` against float64, for the interpreter and for a GPU."""

import torch

from samoyeds_compile.ops import reference
from tests.ops.operands import assert_close, double, floating, leaves_of, operands, results
from tests.ops.test_sparse_experts import packed_operands

OPS = torch.ops.samoyeds
IDS = torch.tensor([[0, 3], [1, 0], [2, 2], [0, -1], [9, 3]])
"""An expert named twice, ids that are no expert, and experts without tokens (4 of 5)."""


def on(device, args):
    return torch.utils._pytree.tree_map(lambda a: a.to(device) if torch.is_tensor(a) else a, args)


def case(layout="concatenated", weight_layout="out_in", bias=True, dtype=torch.float32, ids=IDS, device="cpu"):
    """Operands of five experts, no size a whole tile."""
    args = operands(1, *ids.shape, 5, 24, 20, layout, weight_layout, bias, dtype)
    args[1] = ids
    return on(device, args)


def block(args):
    return OPS.experts_gpu(*args, args[0].dtype, None)


def check(args):
    """The result and the gradients of all operands."""
    expected = results(lambda a: reference.moe_experts(*a), double(on("cpu", args)))
    assert_close([t.cpu() for t in results(block, args)], expected, args[0].dtype)


def check_packed(args, config, device="cpu"):
    """Packed weights are frozen; the result and the gradients of all else are those of the pruned weights."""
    dense, packed = packed_operands(args, config)
    trained = [i for i, a in enumerate(args) if torch.is_tensor(a) and a.is_floating_point()]

    def of(function, given):
        leaves = [leaves_of([a], requires_grad=i in trained)[0] for i, a in enumerate(given)]
        out = function(leaves)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
        inputs = [leaves[i] for i in trained]
        return [out, *torch.autograd.grad((out * weight).sum(), inputs, materialize_grads=True)]

    expected = of(lambda a: reference.moe_experts(*a), double(dense))
    given = [a if i in (3, 4, 5) else leaves_of([a], False)[0] for i, a in enumerate(packed)]
    with torch.profiler.profile() as profile:
        found = of(block, on(device, given))
    assert "samoyeds::gpu_experts_backward" in {event.name for event in profile.events()}
    assert_close([t.cpu() for t in found], expected, args[0].dtype)


def check_frozen(args, trained, expected):
    """Operands named by index get the gradients that they get if all are trained; the others get none."""
    leaves = [leaves_of([a], requires_grad=i in trained)[0] for i, a in enumerate(args)]
    out = block(leaves)
    assert out.requires_grad == bool(trained)
    if trained:
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out))
    for leaf, grad in zip(floating(leaves), expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, grad)
