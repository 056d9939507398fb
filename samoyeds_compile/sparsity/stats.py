"""Sums over calibration tokens that describe the inputs of a projection."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from samoyeds_compile.sparsity.projections import Projection
from samoyeds_compile.sparsity.sample import Sample

SAMPLED = 128
"""Tokens of a layer that are kept to measure the output error, at most; split among its experts. Few, as those of all
layers are there at the same time."""
LEAST_SAMPLED = 4
"""Tokens kept for each expert, however many there are."""


@dataclass(frozen=True)
class Wanted:
    """What to gather.

    Attributes:
        routed: weigh a token by its squared routing weight, which is how its error counts in the block's output.
        hessian: the matrix of second moments too.
        sample: keep some tokens.
    """

    routed: bool = False
    hessian: bool = False
    sample: bool = True


@dataclass
class InputStats:
    """Sums over the tokens that reach each expert, x the projection's input and f a token's factor.

    Attributes:
        count: [E] tokens.
        mass: [E] sum of f.
        sums: [E, cols] sum of f x.
        squares: [E, cols] sum of f x².
        hessian: [E, cols, cols] sum of f x xᵀ, or None.
        samples: of each expert, some of its tokens; empty if none were wanted.
    """

    count: Tensor
    mass: Tensor
    sums: Tensor
    squares: Tensor
    hessian: Tensor | None
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def zeros(cls, projection: Projection, wanted: Wanted, share: int = 1) -> InputStats:
        """Of no tokens; ``share`` experts of the layer have statistics of their own."""
        experts, cols, device = projection.experts, projection.shape[1], projection.parameter.device
        room = max(LEAST_SAMPLED, SAMPLED // (experts * share))
        sampled = experts if wanted.sample else 0
        rooms = torch.empty(sampled, room, cols, dtype=projection.parameter.dtype, device=device)
        return cls(
            torch.zeros(experts, dtype=torch.int64),
            torch.zeros(experts, dtype=torch.float64, device=device),
            torch.zeros(experts, cols, dtype=torch.float32, device=device),
            torch.zeros(experts, cols, dtype=torch.float32, device=device),
            torch.zeros(experts, cols, cols, dtype=torch.float32, device=device) if wanted.hessian else None,
            [Sample(room, seed) for seed, room in enumerate(rooms)],
        )

    def add(self, expert: int, x_NC: Tensor, weights_N: Tensor, routed: bool) -> None:
        """Count tokens of an expert, with their routing weights."""
        x, f = x_NC.float(), weights_N.float().square() if routed else torch.ones_like(weights_N, dtype=torch.float32)
        fx = x * f.unsqueeze(1)
        self.count[expert] += len(x)
        self.mass[expert] += f.sum()
        self.sums[expert] += fx.sum(0)
        self.squares[expert] += (fx * x).sum(0)
        if self.hessian is not None:
            self.hessian[expert].addmm_(fx.mT, x)
        if self.samples:
            self.samples[expert].add(x_NC, weights_N)

    def reached(self, expert: int) -> bool:
        """Whether a token with any weight and any input reached an expert."""
        return int(self.count[expert]) > 0 and bool(self.squares[expert].any())

    def norm(self, expert: int) -> Tensor:
        """[cols]: root of the mean square of each input feature."""
        return (self.squares[expert] / self.mass[expert]).sqrt().float()

    def mean(self, expert: int) -> Tensor:
        """[cols]: mean of each input feature."""
        return (self.sums[expert] / self.mass[expert]).float()

    def reorder(self, expert: int, order: Tensor) -> None:
        """Put the input features of an expert into another order."""
        self.sums[expert] = self.sums[expert][order]
        self.squares[expert] = self.squares[expert][order]
        if self.hessian is not None:
            self.hessian[expert] = self.hessian[expert][order][:, order]
        if self.samples:
            self.samples[expert].reorder(order)


Stats = dict[str, InputStats]
"""Statistics of projections, by name."""
