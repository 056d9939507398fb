"""What an integration knows about a class of experts that it can make capturable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Unsupported(Exception):
    """A module of a known class that is left alone; the text says why."""


def no_activation(module: nn.Module) -> str:
    """For modules that have none."""
    return ""


@dataclass(frozen=True)
class Family:
    """A class of experts and the forward that stands in for its own while Dynamo traces.

    Attributes:
        module, name: where the class is defined.
        forward: ``forward(module, activation, *args)``, what the class computes, in a form that Dynamo captures.
        sample: arguments for a small trial of both forwards, out of a module and a generator.
        activation: the module's activation as an expression; raises `Unsupported` where it has none.
        count: number of experts of a module, or None for a helper of a module that has them.
    """

    module: str
    name: str
    forward: Callable[..., Any]
    sample: Callable[[Any, torch.Generator], tuple[Any, ...]]
    activation: Callable[[Any], str] = no_activation
    count: Callable[[Any], int] | None = None

    @property
    def is_experts(self) -> bool:
        """Whether modules of this class are sets of experts, rather than helpers of one."""
        return self.count is not None


def tokens(module: nn.Module, hidden: int, generator: torch.Generator, count: int = 6) -> Tensor:
    """[count, hidden]: random tokens where and as the module's weights are."""
    weight = next(module.parameters())
    return torch.randn(count, hidden, generator=generator).to(weight)


def routing(like_TH: Tensor, experts: int, generator: torch.Generator, top_k: int = 2) -> tuple[Tensor, Tensor]:
    """([T, K] ids, [T, K] weights): random distinct experts for each of the tokens."""
    scores = torch.rand(like_TH.shape[0], experts, generator=generator).to(like_TH.device)
    weights_TK, ids_TK = scores.topk(min(top_k, experts), dim=-1)
    return ids_TK, weights_TK.to(like_TH.dtype)
