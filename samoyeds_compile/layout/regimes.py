"""For which numbers of tokens which layouts are best: thresholds, solved from the costs.

A kernel decides for each expert by how many tokens that has, in the call; all it needs are the numbers of tokens with
which rows are best left token-major (`few`). For people, and for the choice between variants, these are translated into
numbers of tokens of the block, by the distribution of an expert's tokens under even routing, Binomial(T, K / E).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from samoyeds_codegen.cpp.layouts import MOST
from samoyeds_compile.layout.algebra import Place
from samoyeds_compile.layout.assign import Assignment, Problem, price, with_runners_up
from samoyeds_compile.layout.declare import PER_EXPERT
from samoyeds_compile.layout.machine import Constants
from samoyeds_compile.layout.rates import Kernel, Rates
from samoyeds_compile.layout.region import Sizes, evaluate_float, experts_region

MOST_TOKENS = 2**24
FUSED = 0.95
INTO_UP = "gather -> expert_up"
HALF = 0.5
"""Of an expert: fewer than that many are expected where a regime says that there are none."""


@dataclass(frozen=True)
class Regime:
    """A range of token counts in which one assignment is best.

    Attributes:
        name: ``decode`` (no expert has tiles), ``mid`` (some have), or ``prefill`` (practically all have).
        first, last: tokens; None: without end.
        assignment: the layouts, for `tokens` tokens.
        tokens: where in the range the assignment was made.
        kernel: on a GPU, which it was made for.
    """

    name: str
    first: int
    last: int | None
    assignment: Assignment
    tokens: int
    kernel: str = ""


@functools.lru_cache(maxsize=256)
def few(sizes: Sizes, constants: Constants) -> tuple[int, ...]:
    """Numbers of tokens, 1 to `MOST`, with which an expert's rows are best left token-major.

    There may be gaps: tiles are best for as many tokens as fill them, rows where one more tile would be nearly empty.
    The same whatever ``sizes.tokens``.
    """
    rows, tiles = (_costs(sizes, constants, place) for place in (Place.SLOTS, Place.TILES))
    return tuple(n for n in range(1, MOST + 1) if rows[n - 1] <= tiles[n - 1])


def _costs(sizes: Sizes, constants: Constants, place: Place) -> list[int]:
    """Of one expert with 1 to `MOST` tokens, in the best layouts with rows, or with tiles, before gate and up."""
    region, one = experts_region(sizes), sizes.of_one_expert(1)
    problem = Problem(region, one.numbers(constants))
    problem.pin(INTO_UP, place)
    problem.pin(INTO_UP, place, written=False)
    layouts = problem.solve().edges
    return [price(region, layouts, one.at(n).numbers(constants)) for n in range(1, MOST + 1)]


@functools.lru_cache(maxsize=256)
def regimes(sizes: Sizes, constants: Constants) -> tuple[Regime, ...]:
    """At most three, from one token on."""
    rows = few(sizes, constants)
    starts = {
        "decode": 1,
        "mid": first_tokens(lambda tokens: tiled(sizes, rows, tokens) >= HALF),
        "prefill": first_tokens(lambda tokens: tiled(sizes, rows, tokens) >= HALF > untiled(sizes, rows, tokens)),
    }
    names = [name for name in starts if starts[name] < min([MOST_TOKENS, *_later(starts, name)])]
    return tuple(_regime(sizes, constants, name, starts, names) for name in names)


def _later(starts: dict[str, int], name: str) -> list[int]:
    order = list(starts)
    return [starts[other] for other in order[order.index(name) + 1 :]]


def _regime(sizes: Sizes, constants: Constants, name: str, starts: dict[str, int], names: list[str]) -> Regime:
    following = names[names.index(name) + 1 :]
    first, last = starts[name], starts[following[0]] - 1 if following else None
    tokens = first if name != "mid" or last is None else round(math.sqrt(first * last))
    at = sizes.at(tokens)
    region, numbers = experts_region(at), at.numbers(constants)
    found = with_runners_up(region, numbers)
    if name == "prefill" and found[INTO_UP].read is not Place.TILES:  # a close call, which experts decide one by one
        found = with_runners_up(region, numbers, {INTO_UP: Place.TILES})
    return Regime(name, first, last, found, tokens)


def first_tokens(holds: Callable[[int], bool]) -> int:
    """The least number of tokens for which something holds that, once it holds, goes on to; or `MOST_TOKENS`."""
    low, high = 0, 1
    while not holds(high):
        if high >= MOST_TOKENS:
            return MOST_TOKENS
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def tiled(sizes: Sizes, rows: tuple[int, ...], tokens: int) -> float:
    """Expected number of experts whose tokens are in tiles, if those with a number of tokens in ``rows`` have none."""
    others = (0, *rows)
    return sizes.experts * max(0.0, 1 - sum(_chance(sizes, tokens, n) for n in others))


def untiled(sizes: Sizes, rows: tuple[int, ...], tokens: int) -> float:
    """Expected number of experts that have tokens, but no tiles."""
    return sizes.experts * sum(_chance(sizes, tokens, n) for n in rows)


def _chance(sizes: Sizes, tokens: int, count: int) -> float:
    """That an expert has just so many tokens."""
    share = min(sizes.top_k / sizes.experts, 1.0)
    if count > tokens or share in (0.0, 1.0):
        return float(count == tokens * share)
    ways = math.lgamma(tokens + 1) - math.lgamma(count + 1) - math.lgamma(tokens - count + 1)
    return math.exp(ways + count * math.log(share) + (tokens - count) * math.log1p(-share))


def crossing(sizes: Sizes, constants: Constants) -> int:
    """Tokens of the block from which tiles are best for an expert with the mean number of them, for the first time."""
    rows = few(sizes, constants)
    gap = next((n for n in range(1, MOST + 1) if n not in rows), MOST)
    return first_tokens(lambda tokens: per_expert(sizes.at(tokens), constants) >= gap)


def per_expert(sizes: Sizes, constants: Constants) -> float:
    """Expected tokens of an expert that has any."""
    return evaluate_float(PER_EXPERT, sizes.numbers(constants))


def kernel_beats(library: Rates, kernel: Kernel) -> int | None:
    """Most tokens an expert up to which a kernel beats PyTorch's products; None: always.

    By `FUSED`, as what stands around those products was not fused when they were measured, and is by Inductor.
    """
    for tokens in range(1, 8 * MOST):
        if min(picoseconds(kernel.rows, tokens), picoseconds(kernel.tiles, tokens)) > FUSED * picoseconds(
            library, tokens
        ):
            return tokens - 1
    return None


def picoseconds(rates: Rates, tokens: int) -> float:
    """For each weight of an expert with so many tokens."""
    padded = -(-tokens // rates.lanes) * rates.lanes
    return max(rates.read, rates.step + rates.mac * padded)
