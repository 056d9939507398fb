"""A uniform sample of bounded size of a stream of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Sample:
    """Up to ``room`` of the tokens seen, each with equal probability: those with the smallest random keys.

    Attributes:
        x: [n, cols] tokens, in their dtype; None before the first.
        weights: [n] their routing weights.
    """

    def __init__(self, room: int, seed: int) -> None:
        self.x: Tensor | None = None
        self.weights: Tensor | None = None
        self._keys = torch.empty(0)
        self._room = room
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, x_NC: Tensor, weights_N: Tensor) -> None:
        """See tokens."""
        keys = torch.cat([self._keys, torch.rand(len(x_NC), generator=self._generator)])
        kept = keys.argsort()[: self._room]
        self._keys, kept = keys[kept], kept.to(x_NC.device)
        if self.x is not None and self.weights is not None:
            x_NC, weights_N = torch.cat([self.x, x_NC]), torch.cat([self.weights, weights_N])
        self.x, self.weights = x_NC[kept], weights_N[kept]

    def reorder(self, order: Tensor) -> None:
        """Put the features into another order."""
        if self.x is not None:
            self.x = self.x[:, order]

    def errors(self, dense_RC: Tensor, pruned_RC: Tensor) -> tuple[float, float]:
        """Squared error and squared size of the outputs of two matrices, each token weighed as it is routed."""
        if self.x is None or self.weights is None:
            return 0.0, 0.0
        x = self.x.float() * self.weights.float().unsqueeze(1)
        dense = dense_RC.float()
        error, size = x @ (dense - pruned_RC.float()).mT, x @ dense.mT
        return float(error.square().sum()), float(size.square().sum())
