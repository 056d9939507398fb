"""How rows lie between the stages inside a kernel: part of its specification, chosen by whoever asks for it."""

from __future__ import annotations

from dataclasses import dataclass

from samoyeds_codegen.errors import UnsupportedSpecError

MOST = 62
"""The last bit of `Layouts.few`."""
EDGES = "xh"
"""Edges with a choice of order: ``x``, the rows that go into gate and up, and ``h``, the activations."""


@dataclass(frozen=True)
class Layouts:
    """Layouts of the edges inside a kernel of experts.

    An expert with few tokens keeps its rows token by token (token-major). One with more has tiles in which tokens are
    contiguous (feature-major); gather and activation write them as the next product wants them. Edges named in
    ``by_rows`` are written token by token there too and turned in a pass of their own, as stages do that know nothing
    of each other.

    Attributes:
        few: bit n says whether an expert with n tokens keeps its rows token-major, bit `MOST` whether one with as many
            or more does. A number of the call, not of the text.
        by_rows: out of `EDGES`, in that order.
        most: tokens an expert, on average, with more of which PyTorch's products compute the block, rows sorted by
            expert; calls decide. None: no number is too many.

    Raises:
        UnsupportedSpecError: ``few`` has other bits, ``by_rows`` names something else, or ``most`` is negative.
    """

    few: int = (1 << 13) - 1
    by_rows: str = ""
    most: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.few < 2 << MOST:
            raise UnsupportedSpecError(f"few is {self.few}; pass bits 0 to {MOST}")
        if self.by_rows not in ("", "x", "h", "xh"):
            raise UnsupportedSpecError(f"by_rows is {self.by_rows!r}; pass some of {EDGES!r}, in that order")
        if self.most is not None and self.most < 0:
            raise UnsupportedSpecError(f"most is {self.most}; pass a number of tokens, or None")

    @classmethod
    def up_to(cls, most: int, by_rows: str = "") -> Layouts:
        """Token-major for at most so many tokens of an expert; from `MOST` on for any number."""
        return cls((2 << min(most, MOST)) - 1, by_rows)

    @property
    def name(self) -> str:
        """One word: ``1fff``, ``1fff:xh``, or ``1fff::24``."""
        most = "" if self.most is None else str(self.most)
        return f"{self.few:x}:{self.by_rows}:{most}".rstrip(":")

    @classmethod
    def named(cls, name: str) -> Layouts:
        """Inverse of `name`."""
        few, by_rows, most = f"{name}::".split(":")[:3]
        return cls(int(few, 16), by_rows, int(most) if most else None)

    def keeps_rows(self, tokens: int) -> bool:
        """Whether an expert with so many tokens keeps its rows token-major."""
        return bool(self.few >> min(tokens, MOST) & 1)

    def fits(self, slots: int, experts: int) -> bool:
        """Whether a kernel is for so many slots of all experts."""
        return self.most is None or slots <= self.most * experts

    @property
    def constants(self) -> list[str]:
        """What the text of a kernel has of it."""
        return [f"constexpr bool {edge.upper()}_BY_ROWS = {str(edge in self.by_rows).lower()};" for edge in EDGES]
