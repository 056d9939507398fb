"""A trial of two ways to compute the same thing, on a few random inputs, before one stands in for the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.errors import IntegrationError

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Relative to the largest entry, which keeps different orders of summation apart from different formulas."""
_LOW_PRECISION = 5e-2


def disagreement(
    original: Callable[..., Any], other: Callable[..., Any], args: tuple[Any, ...], device: torch.device
) -> str | None:
    """Why ``other`` does not compute what ``original`` computes of ``args``, or None if it does.

    Runs both on ``device`` without gradients or autocast; the random state is left as it was.
    """
    with torch.no_grad(), torch.random.fork_rng(), torch.autocast(device.type, enabled=False):
        try:
            expected, found = _tensors(original(*args)), _tensors(other(*args))
        except IntegrationError:  # names what the module does not have
            raise
        except Exception as error:
            return f"a trial raised {type(error).__name__}: {error}"
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in found]:
        return "in a trial, shapes or dtypes of the results differ"
    worst = max((_deviation(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    return None if worst <= 1 else f"in a trial, the results differ by {worst:.1f} times the tolerance"


def _tensors(result: Any) -> list[Tensor]:
    """The tensors of a result; a list of numbers counts as one."""
    results = result if isinstance(result, tuple) else (result,)
    return [torch.as_tensor(part) for part in results]


def _deviation(expected: Tensor, found: Tensor) -> float:
    """Largest difference, in units of the tolerance; NaN (weights that were never set) equals NaN."""
    tolerance = _TOLERANCE.get(expected.dtype, _LOW_PRECISION)
    expected, found = expected.double().nan_to_num(), found.double().nan_to_num()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return float((expected - found).abs().max()) / (tolerance * max(scale, 1e-30)) if expected.numel() else 0.0
