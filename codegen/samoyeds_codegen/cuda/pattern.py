"""Which sparse patterns kernels know, and what a pattern means for them."""

from __future__ import annotations

from dataclasses import dataclass

from samoyeds_codegen.cuda.layout import STEP_COLUMNS
from samoyeds_codegen.errors import UnsupportedSpecError

PATTERNS = ((1, 1), (1, 2), (2, 4))
VECTORS = (32, 64, 128)


def require(holds: bool, reason: str) -> None:
    """Refuse a specification unless something holds.

    Raises:
        UnsupportedSpecError: it does not.
    """
    if not holds:
        raise UnsupportedSpecError(reason)


@dataclass(frozen=True)
class Pattern:
    """A sparse pattern with 2:4 inside kept sub-rows (see ``SparsityConfig``).

    Raises:
        UnsupportedSpecError: sparse tensor cores have no kernel for it; the message says why.
    """

    n: int
    m: int
    vector: int
    group: int = 1

    def __post_init__(self) -> None:
        known = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
        more = "each further choice of sub-rows takes another set of sums in registers"
        require((self.n, self.m) in PATTERNS, f"pattern {self.n}:{self.m} is not one of {known}: {more}")
        short = f"one instruction takes {STEP_COLUMNS} columns, which must agree on a sub-row"
        require(self.vector in VECTORS, f"vectors of {self.vector} columns are not among {VECTORS}: {short}")
        require(self.group >= 1, f"a group of {self.group} blocks is none")

    @property
    def selects(self) -> bool:
        """Whether there is a choice of sub-rows."""
        return self.n < self.m

    @property
    def sets(self) -> int:
        """How many dense rows a condensed row may belong to, each with sums of its own."""
        return self.m - self.n + 1

    @property
    def dense_rows(self) -> int:
        """Dense rows for each condensed row."""
        return self.m // self.n

    def __str__(self) -> str:
        """As ``SparsityConfig`` writes it."""
        return f"{self.n}:{self.m}:{self.vector}+2:4" + (f"/{self.group}" if self.group != 1 else "")
