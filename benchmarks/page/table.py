"""A table of the page, and the two ways to make one of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Content = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Text cells; ``ratios`` are the peer's time by ours, where the table has such."""

    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    ratios: Sequence[float] = field(default=())

    def markdown(self) -> str:
        """The caption stands above."""
        rows = [self.header, ["---"] * len(self.header), *self.lines]
        return "\n".join([f"{self.caption}:", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def two_digits(value: float) -> str:
    """Half up: files have three digits, so 1.065 is common, and a little less as a binary number."""
    return f"{value + 1e-9:.2f}"


def ratio(value: float, quiet: bool = True) -> str:
    """Two digits; a loss is bold, a disturbed point has a mark."""
    text = two_digits(value)
    return bold(text, float(text) < 1) + ("" if quiet else " ~")


def bold(text: str, yes: bool) -> str:
    """As losses are."""
    return f"**{text}**" if yes else text


def by_tokens(caption: str, rows: Sequence[Row], keys: Sequence[str], value: Callable[[Row], float]) -> Table:
    """Ratios; a line for each value of the keys, a column for each number of tokens."""
    counts = sorted({row["tokens"] for row in rows})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        name = tuple(str(row[key]) for key in keys)
        lines.setdefault(name, {})[row["tokens"]] = ratio(value(row), row.get("quiet", True))
    header = [*keys, f"{counts[0]:,} token{'s' * (counts[0] > 1)}", *(f"{count:,}" for count in counts[1:])]
    cells = [[*name, *(line.get(count, "-") for count in counts)] for name, line in lines.items()]
    return Table(caption, header, cells, [value(row) for row in rows])


def listed(caption: str, rows: Sequence[Row], columns: Mapping[str, Callable[[Row], str]]) -> Table:
    """A line for each row."""
    return Table(caption, list(columns), [[text(row) for text in columns.values()] for row in rows])
