"""``zoo::gmm``: a grouped matrix product that torch knows nothing about, like the one that MegaBlocks calls."""

import torch
from torch import Tensor


@torch.library.custom_op("zoo::gmm", mutates_args=())
def gmm(x: Tensor, w: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
    """Rows of expert e times w[e], [in, out], or [out, in] if ``trans_b``; ``sizes`` counts the rows of each expert."""
    matrices = w.transpose(1, 2) if trans_b else w
    parts = x.split(sizes.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, matrices, strict=True)])


@gmm.register_fake
def _(x: Tensor, w: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1 if trans_b else 2])


@torch.library.custom_op("zoo::gmm_weight", mutates_args=())
def gmm_weight(x: Tensor, grad: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
    """The derivative of `gmm` by its weight."""
    left, right = (grad, x) if trans_b else (x, grad)
    counts = sizes.tolist()
    return torch.stack([a.t() @ b for a, b in zip(left.split(counts), right.split(counts), strict=True)])


@gmm_weight.register_fake
def _(x: Tensor, grad: Tensor, sizes: Tensor, trans_b: bool) -> Tensor:
    left, right = (grad, x) if trans_b else (x, grad)
    return x.new_empty(sizes.shape[0], left.shape[1], right.shape[1])


def _setup(ctx, inputs, output) -> None:
    x, w, sizes, ctx.trans_b = inputs
    ctx.save_for_backward(x, w, sizes)


def _backward(ctx, grad: Tensor):
    x, w, sizes = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = torch.ops.zoo.gmm(grad, w, sizes, not ctx.trans_b) if ctx.needs_input_grad[0] else None
    grad_w = torch.ops.zoo.gmm_weight(x, grad, sizes, ctx.trans_b) if ctx.needs_input_grad[1] else None
    return grad_x, grad_w, None, None


gmm.register_autograd(_backward, setup_context=_setup)
