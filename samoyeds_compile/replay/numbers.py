"""From the sizes in a region to the sizes of a replay.

A region has few independent dimensions: those of the tokens (T, or B and L, or C rows for each expert), H and I. A size
in the graph is one of them or a product with K, E or 2. Which one cannot always be told from the number: with 32
tokens, K = 2 and H = 64, is 64 the number of slots or the hidden size? So a size has several `choices` in such a case,
likeliest first, and the replay finds out which of them fit together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from samoyeds_compile.graph.extract import known_size
from samoyeds_compile.graph.sizes import Size
from samoyeds_compile.graph.values import hint
from samoyeds_compile.match.region import MoERegion

_RANKS = {
    "tokens": ("tokens", "plain", "hidden", "width"),
    "features": ("hidden", "width", "plain", "tokens"),
    "hidden": ("hidden", "width", "plain", "tokens"),
    "width": ("width", "hidden", "plain", "tokens"),
    "plain": ("plain", "hidden", "width", "tokens"),
}
"""What a size likely counts, by what its place prefers."""


@dataclass(frozen=True)
class Dimensions:
    """Numbers for the independent dimensions: leading sizes of the tokens, H, I."""

    tokens: tuple[int, ...]
    hidden: int
    width: int

    @property
    def rows(self) -> int:
        """T, or C where every expert has rows of its own."""
        return math.prod(self.tokens)


def dimensions_of(region: MoERegion) -> Dimensions:
    """The sizes a region has in the graph.

    Raises:
        ValueError: the number of tokens is not known before the graph runs.
    """
    leading = region.output.shape[:-1]
    if region.offsets is not None and not all(map(known_size, leading)):
        leading = (1,)  # what ranks receive; no number in the region can be mistaken for it
    if not all(map(known_size, leading)):
        raise ValueError("the number of tokens is not known before the graph runs")
    tokens = [hint(size) for size in leading]
    if region.batched:
        tokens = _rows_of_expert(tokens, region.num_experts)
    return Dimensions(tuple(tokens), region.hidden_size, region.intermediate_size)


def _rows_of_expert(leading: list[int], experts: int) -> list[int]:
    """The sizes that count one expert's rows: [E, C] or [E * C] without E."""
    if experts in leading:
        at = leading.index(experts)
        return leading[:at] + leading[at + 1 :] or [1]
    return [math.prod(leading) // experts]


class Numbers:
    """The sizes of one replay.

    Attributes:
        old: the dimensions in the graph.
        new: those of the replay.
    """

    def __init__(self, region: MoERegion, old: Dimensions, new: Dimensions) -> None:
        self.old, self.new = old, new
        self._meanings: dict[int, list[tuple[str, int, int]]] = defaultdict(list)  # (what it counts, degree, number)
        experts, top_k = region.num_experts, region.top_k
        fixed = [1, 2, experts - 1, experts + 1]
        for number in fixed if region.capacity is None else [*fixed, region.capacity]:
            self._meanings[number].append(("plain", 0, number))
        for (rows, new_rows), constant in _products(_spans(old, new), {1, top_k, experts, top_k * experts}):
            for name, feature, new_feature in _features(old, new):
                counts = "tokens" if rows is not None else name
                degree = (rows is not None) + (constant != 1) + (name != "plain")
                number = (1 if rows is None else rows) * constant * feature
                self._meanings[number].append((counts, degree, new_rows * constant * new_feature))

    def choices(self, size: Size) -> tuple[int, ...]:
        """The numbers that may stand for a size, likeliest first."""
        ranks = _RANKS[size.prefers]
        found = [m for m in self._meanings.get(size.number, ()) if not (size.symbolic and m[0] in ("hidden", "width"))]
        found.sort(key=lambda m: (ranks.index(m[0]), m[1]))
        return tuple(dict.fromkeys(number for _, _, number in found)) or (size.number,)

    def allows(self, old: int | None, new: int) -> bool:
        """Whether a result may have size ``new`` where it had size ``old``; what has no meaning may have any."""
        meanings = self._meanings.get(old) if old is not None else None
        return meanings is None or any(number == new for _, _, number in meanings)


def _spans(old: Dimensions, new: Dimensions) -> Iterator[tuple[int | None, int]]:
    """No tokens at all, and every product of neighbouring sizes of the tokens."""
    yield None, 1
    for start in range(len(old.tokens)):
        for stop in range(start + 1, len(old.tokens) + 1):
            yield math.prod(old.tokens[start:stop]), math.prod(new.tokens[start:stop])


def _features(old: Dimensions, new: Dimensions) -> list[tuple[str, int, int]]:
    return [
        ("plain", 1, 1),
        ("hidden", old.hidden, new.hidden),
        ("width", old.width, new.width),
        ("width", 2 * old.width, 2 * new.width),
    ]


def _products(spans: Iterator[tuple[int | None, int]], constants: set[int]) -> list[tuple[tuple[int | None, int], int]]:
    return [(span, constant) for span in spans for constant in sorted(constants)]
