"""Rows of tokens in slot order that are gathered when they are read, so that [S, H] never is in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Reads like the tensor ``x[token]``, as far as products by expert do.

    Attributes:
        x_TH: tokens.
        token_S: int64; the token of every slot.
    """

    x_TH: Tensor
    token_S: Tensor

    def __getitem__(self, which: int | slice) -> Tensor:
        """A row [H], or rows [n, H], as new memory."""
        token = self.token_S[which]
        return self.x_TH[token] if token.dim() == 0 else self.x_TH.index_select(0, token)

    @property
    def shape(self) -> tuple[int, int]:
        """(S, H)."""
        return self.token_S.shape[0], self.x_TH.shape[1]

    @property
    def nbytes(self) -> int:
        """What the rows would take."""
        return self.token_S.shape[0] * self.x_TH.shape[1] * self.x_TH.element_size()

    @property
    def dtype(self) -> torch.dtype:
        """Of the tokens."""
        return self.x_TH.dtype

    @property
    def device(self) -> torch.device:
        """Of the tokens."""
        return self.x_TH.device

    def new_empty(self, *shape: int) -> Tensor:
        """A tensor of the same dtype and device."""
        return self.x_TH.new_empty(shape)

    def gathered(self) -> Tensor:
        """All rows, [S, H]."""
        return self.x_TH.index_select(0, self.token_S)
