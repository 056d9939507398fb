"""What a product costs on a machine, by its tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Picoseconds that a product takes for each weight of an expert, ``max(read, step + mac * tokens)``.

    Attributes:
        read: what it takes at least, to get the weight from memory.
        step: what does not depend on the tokens, such as unpacking.
        mac: for each token.
        lanes: tokens are computed in multiples of it.
    """

    read: float
    step: float
    mac: float
    lanes: int = 1


@dataclass(frozen=True)
class Kernel:
    """A kernel of experts: ``rows`` for few tokens, token-major, and ``tiles`` for many, feature-major."""

    rows: Rates
    tiles: Rates
