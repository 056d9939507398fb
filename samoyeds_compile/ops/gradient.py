"""Autograd inside an operator, below which it is switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pull_back(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Callable[[Tensor], Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result of a function, and the gradients of its inputs.

    `torch.func.vjp` would do, but fails inside an operator that is called under a dispatch mode (a counter of
    operations, a check), as its keys are excluded there as well.

    Args:
        function: differentiable.
        inputs: of which it is a function.
        grad: the gradient of its result, which it is given.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, grad(out.detach()), materialize_grads=True)
    return out.detach(), grads
