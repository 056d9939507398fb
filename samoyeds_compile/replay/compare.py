"""Results and gradients of two programs, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.match.region import MoERegion

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
"""Largest deviation allowed, relative to the largest entry, by the least precise dtype involved."""


def tolerance(region: MoERegion) -> float:
    """The deviation that rounding explains."""
    dtypes = [v.dtype for v in [*region.inputs, region.output] if v.dtype in TOLERANCE]
    dtypes += [p.compute_dtype for p in region.projections]
    return max(TOLERANCE[d] for d in dtypes if d is not None)


def results(
    program: Callable[..., Any],
    inputs: Sequence[Any],
    needs_grad: bool,
    together: Sequence[Sequence[int]],
    written: Collection[int] = (),
) -> list[Tensor]:
    """The output, and the gradients of every floating input for a fixed cotangent.

    Args:
        program: gets copies of the inputs and returns a tensor.
        inputs: tensors and numbers.
        needs_grad: whether to compute gradients.
        together: indices of inputs (one matrix of each expert) whose gradients count as one.
        written: indices of inputs that the program may write to.
    """
    leaves = [_leaf(t, needs_grad) if isinstance(t, Tensor) else t for t in inputs]
    out = program(*(t.clone() if i in written and isinstance(t, Tensor) else t for i, t in enumerate(leaves)))
    if not needs_grad:
        return [out]
    differentiable = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    found = torch.autograd.grad(out, differentiable, cotangent, allow_unused=True) if out.requires_grad else ()
    received = dict(zip(map(id, differentiable), found, strict=False))
    gradients = {id(t): torch.zeros_like(t) if received.get(id(t)) is None else received[id(t)] for t in differentiable}
    stacked = [torch.stack([gradients[id(leaves[i])] for i in group]) for group in together]
    alone = gradients.keys() - {id(leaves[i]) for group in together for i in group}
    return [out, *stacked, *(gradient for key, gradient in gradients.items() if key in alone)]


def _leaf(tensor: Tensor, needs_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(needs_grad and tensor.dtype.is_floating_point)


def deviation(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest deviation among pairs of tensors."""
    return max(_deviation(a, e) for a, e in zip(actual, expected, strict=True))


def _deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry; infinite where shape, dtype or finiteness differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max().clamp(min=1e-6)
    value = float(difference / scale)
    return value if value == value else float("inf")
