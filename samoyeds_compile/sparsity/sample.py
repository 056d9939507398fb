"""A uniform sample of bounded size of a stream of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Sample:
    """As many of the tokens seen as there is room for, each equally probable: those with the smallest random keys.

    The room is one tensor, made before any token is seen: tensors that come and go beside others leave gaps in memory.
    """

    def __init__(self, room: Tensor, seed: int) -> None:
        self._x = room  # [most, cols]
        self._weights = torch.empty(len(room), dtype=torch.float32, device=room.device)
        self._keys = torch.empty(0, dtype=torch.float32)
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def x(self) -> Tensor:
        """[n, cols]: the tokens."""
        return self._x[: len(self._keys)]

    @property
    def weights(self) -> Tensor:
        """[n]: their routing weights."""
        return self._weights[: len(self._keys)]

    def add(self, x_NC: Tensor, weights_N: Tensor) -> None:
        """See tokens."""
        keys = torch.cat([self._keys, torch.rand(len(x_NC), generator=self._generator, dtype=torch.float32)])
        order = keys.argsort()[: len(self._x)]
        kept = order.to(self._x.device)
        x = torch.cat([self.x, x_NC.to(self._x)])[kept]
        weights = torch.cat([self.weights, weights_N.to(self._weights)])[kept]
        self._keys = keys[order]
        self.x.copy_(x)
        self.weights.copy_(weights)

    def reorder(self, order: Tensor) -> None:
        """Put the features into another order."""
        self.x.copy_(self.x[:, order])

    def errors(self, dense_RC: Tensor, pruned_RC: Tensor) -> tuple[float, float]:
        """Squared error and squared size of the outputs of two matrices, each token weighed as it is routed."""
        x, dense = self.x.float() * self.weights.unsqueeze(1), dense_RC.float()
        error, size = x @ (dense - pruned_RC.float()).mT, x @ dense.mT
        return float(error.square().sum()), float(size.square().sum())
