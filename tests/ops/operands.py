"""Random operands of the ops, and what the ops and their twins give for them."""

import torch
from torch.utils._pytree import tree_leaves, tree_map

ACTIVATIONS = {
    "concatenated": "silu(gate) * up",
    "interleaved": "(clamp(up, -7.0, 7.0) + 1) * (clamp(gate, None, 7.0) * sigmoid(clamp(gate, None, 7.0) * 1.702))",
    "separate": "gelu(gate, 'tanh') * up",
    "none": "square(relu(x))",
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def projections(generator, e, h, i, layout, weight_layout, bias, dtype=torch.float32, separate=""):
    """Weights, biases, activation and layouts in the order of the ops; ``separate`` names the operands in matrices."""

    def weights(name, rows, columns):
        stack = randn(generator, dtype, e, *((columns, rows) if weight_layout == "in_out" else (rows, columns)))
        return list(stack.clone().unbind()) if name in separate.split(",") else [stack]

    packed = 2 * i if layout in ("concatenated", "interleaved") else i
    gated = layout == "separate"
    return [
        weights("gate", i, h) if gated else [], weights("up", packed, h), weights("down", h, i),
        randn(generator, dtype, e, i) if bias and gated else None,
        randn(generator, dtype, e, packed) if bias else None, randn(generator, dtype, e, h) if bias else None,
        ACTIVATIONS[layout], layout, weight_layout,
    ]  # fmt: skip


def operands(
    seed, t, k, e, h, i, layout, weight_layout, bias, dtype=torch.float32, sentinels=True, separate="",
    weighting="output",
):  # fmt: skip
    """Random operands of `moe_experts` in its order, but for the dtypes at the end."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1 if sentinels else 0, e + 1 if sentinels else e, (t, k), generator=g)
    rows, weights = randn(g, dtype, t, h), randn(g, dtype, t, k)
    return [rows, ids, weights, *projections(g, e, h, i, layout, weight_layout, bias, dtype, separate), weighting]


def randn(generator, dtype, *shape):
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)


def floating(tree):
    return [a for a in tree_leaves(tree) if torch.is_tensor(a) and a.is_floating_point()]


def map_floating(function, tree):
    return tree_map(lambda a: function(a) if torch.is_tensor(a) and a.is_floating_point() else a, tree)


def leaves_of(args, requires_grad=True):
    return map_floating(lambda a: a.detach().requires_grad_(requires_grad), args)


def double(args):
    return map_floating(lambda a: a.double(), args)


def results(function, args):
    """Output, and the gradients of all floating operands."""
    leaves = leaves_of(args)
    out = function(leaves)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    inputs = floating(leaves)
    grads = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [out, *(torch.zeros_like(a) if grad is None else grad for a, grad in zip(inputs, grads, strict=True))]


def assert_close(actual, expected, dtype):
    """Relative to the largest entry; what is far smaller than all else is a sum that cancels."""
    least = max([1e-2, *(float(t.detach().abs().max()) for t in expected if t.numel())]) / 10
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        scale = max(float(theirs.detach().abs().max()), least) if theirs.numel() else 1.0
        torch.testing.assert_close(mine.double() / scale, theirs / scale, rtol=0, atol=TOLERANCE[dtype])
