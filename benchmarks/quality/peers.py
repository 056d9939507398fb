"""Masks of other patterns of the same density, for comparison: unstructured, and V:N:M as in VENOM."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    """The largest scores of a matrix, wherever they are."""

    density: float

    def __str__(self) -> str:
        return f"unstructured {1 - self.density:.0%}"

    def mask(self, scores: Tensor) -> Tensor:
        """Of a matrix [rows, cols]."""
        kept = round(self.density * scores.numel())
        order = scores.flatten().argsort(descending=True, stable=True)[:kept]
        return torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(scores)


@dataclass(frozen=True)
class Venom:
    """V:2:M (arXiv 2310.02065): V rows share a choice of 4 of every M columns, in which each row keeps 2."""

    v: int
    m: int = 8

    def __str__(self) -> str:
        return f"VENOM {self.v}:2:{self.m}"

    def mask(self, scores: Tensor) -> Tensor:
        """Of a matrix [rows, cols] that divides into V by M. The choice is the best one, not a heuristic's.

        What 4 columns are worth is what all rows keep of them together, so all choices are tried.
        """
        rows, cols = scores.shape
        blocks = scores.view(rows // self.v, self.v, cols // self.m, self.m).transpose(1, 2)  # [R, C, V, M]
        choices = torch.combinations(torch.arange(self.m), 4)  # [choices, 4]
        worth = torch.stack([blocks[..., chosen].topk(2, dim=-1).values.sum((-1, -2)) for chosen in choices])
        chosen = choices[worth.argmax(0)].unsqueeze(2).expand(-1, -1, self.v, -1)  # [R, C, V, 4]
        inside = blocks.gather(-1, chosen).topk(2, dim=-1).indices
        kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, chosen.gather(-1, inside), True)
        return kept.transpose(1, 2).reshape(rows, cols)


Peer = Unstructured | Venom
