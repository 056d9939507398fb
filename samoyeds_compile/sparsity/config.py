"""Which pattern a sparse weight has."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from samoyeds_compile.errors import SparsityError

VECTORS = (16, 32, 64, 128)
INNER = ("2:4", "none")
MOST_SUB_ROWS = 16
"""Largest m; a choice among more is stored in the same byte, but no kernel is meant for it."""


@dataclass(frozen=True)
class SparsityConfig:
    """A two-level pattern of a weight W [rows, cols] (Samoyeds, EuroSys'25, section 4.1).

    Rows are taken in blocks of ``m``, columns in vectors. In each m x vector block ``n`` of the m sub-rows are kept; of
    a kept sub-row, each aligned group of 4 columns keeps 2 values at most (``inner="2:4"``) or all (``"none"``). Rows
    are output features, columns input features. Both may be ragged: the last block and the last vector are padded.

    Attributes:
        n: sub-rows kept of ``m``; 1 of 1 is plain 2:4.
        m: sub-rows in a block, 1 to 16.
        vector: columns that share a choice of sub-rows: 16, 32, 64 or 128.
        inner: the pattern inside a kept sub-row.
        group: how many blocks of rows, one below the other, share a choice; 16 and 64 fit tiles of matrix units.

    Raises:
        SparsityError: there is no such pattern.
    """

    n: int = 1
    m: int = 2
    vector: int = 32
    inner: str = "2:4"
    group: int = 1

    def __post_init__(self) -> None:
        self._require(_is_count(self.m) and self.m <= MOST_SUB_ROWS, "m", f"pass 1 to {MOST_SUB_ROWS}")
        self._require(_is_count(self.n) and self.n <= self.m, "n", f"pass 1 to m, which is {self.m}")
        self._require(self.vector in VECTORS, "vector", f"pass one of {', '.join(map(str, VECTORS))}")
        self._require(self.inner in INNER, "inner", "pass '2:4' or 'none'")
        self._require(_is_count(self.group), "group", "pass 1 or more")

    def _require(self, holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise SparsityError(f"SparsityConfig: {name} is {getattr(self, name)!r}; {remedy}")

    @property
    def density(self) -> Fraction:
        """The share of values that is kept."""
        return Fraction(self.n, self.m) * (Fraction(1, 2) if self.inner == "2:4" else 1)

    def __str__(self) -> str:
        """``1:2:32+2:4``, with ``/16`` where 16 blocks share a choice."""
        outer = f"{self.n}:{self.m}:{self.vector}"
        return outer + ("+2:4" if self.inner == "2:4" else "") + (f"/{self.group}" if self.group != 1 else "")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
