"""Tokens of a call, who computes them, and what comes out in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import Weights

CHECKED = 2
"""Tokens whose results are compared; more would take longer than what is measured."""


@dataclass(frozen=True)
class Inputs:
    """A batch of tokens.

    Attributes:
        x_TH: tokens.
        ids_TK: int64, the experts of each; no expert twice.
        weights_TK: float32 routing weights that sum to 1.
    """

    x_TH: Tensor
    ids_TK: Tensor
    weights_TK: Tensor

    @property
    def slots(self) -> int:
        """Rows that experts compute."""
        return self.ids_TK.numel()

    def experts_hit(self) -> int:
        """Experts with tokens, whose weights must be read."""
        return int(self.ids_TK.unique().numel())


def make_inputs(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Random tokens of a router that balances its load on average."""
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, shape.hidden, generator=generator, device=device).to(dtype)
    scores = torch.rand(tokens, shape.experts, generator=generator, device=device)
    weights, ids = scores.topk(shape.top_k, dim=-1)
    return Inputs(x, ids, weights / weights.sum(-1, keepdim=True))


def expected(weights: Weights, inputs: Inputs) -> Tensor:
    """The first `CHECKED` tokens of the block in float64."""
    rows = inputs.x_TH[:CHECKED].double()
    out = torch.zeros_like(rows)
    for t, row in enumerate(rows):
        for k, expert in enumerate(inputs.ids_TK[t].tolist()):
            up, down = weights.of_expert(expert)
            gate, other = (up @ row).chunk(2)
            out[t] += inputs.weights_TK[t, k].double() * (down @ (torch.nn.functional.silu(gate) * other))
    return out


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the norm of what is wanted; infinite for what is not finite anywhere in the whole result."""
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found[:CHECKED].double() - wanted).norm() / wanted.norm())
