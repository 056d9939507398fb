"""What each weight is worth: the first-order scores. All take and give [..., rows, cols].

The mask that is best for *squared* scores is taken: with inputs that are uncorrelated, the squared score of a pruned
weight is the squared error that its absence causes in the output.
"""

from __future__ import annotations

from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|W|, float32."""
    return weight.detach().abs().float()


def wanda(weight: Tensor, norm: Tensor) -> Tensor:
    """|W| · ‖X‖, with the norm [..., cols] of each input feature (arXiv 2306.11695).

    Router-weighted, arXiv 2410.12013, is the same with the norm of tokens times their routing weights: ‖X · g‖.
    """
    return magnitude(weight) * norm.float().unsqueeze(-2)


def score(weight: Tensor, norm: Tensor | None) -> Tensor:
    """Score by the norm of the inputs; magnitude where there is none."""
    return magnitude(weight) if norm is None else wanda(weight, norm)
