"""What a replay tries: ways to route tokens, and the sizes to try them at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_compile.match.region import MoERegion
from samoyeds_compile.replay.numbers import Dimensions

LARGEST_REPLAYED = 64
"""Widths above this are replayed at about 48 instead."""

MOST_BYTES = 256 * 2**20
"""Inputs larger than this are not made up."""

MOST_PLACES = 256
"""Experts that take more rows than this are not overfilled: one-hot masks [T, E, C] would grow with the square."""

MOST_ROUNDS = 128
"""How often a case is repeated, with other experts, where its tokens are too few to hit every expert at once."""


@dataclass(frozen=True)
class Case:
    """One way to route tokens.

    Attributes:
        name: what makes it worth testing.
        tokens: how many tokens it wants (without expert ids: rows for each expert).
        ids: ``ids(T, K, E, generator)``, expert ids [T, K]; the ids of a row differ.
        contiguous: whether the tokens lie in one piece of memory.
        required: without it there is no verdict; others may not suit the block (a single token where T is fixed).
        minimal: only with one token, or one in each batch row, is it what its name says.
    """

    name: str
    tokens: int
    ids: Callable[[int, int, int, torch.Generator], Tensor]
    contiguous: bool = True
    required: bool = False
    minimal: bool = False


def cases_of(region: MoERegion) -> list[Case]:
    """The cases for a region."""
    if region.batched:
        return [
            Case("five rows an expert", 5, all_experts, required=True),
            Case("three rows an expert", 3, all_experts),
            Case("one row an expert", 1, all_experts, minimal=True),
            Case("rows in a non-contiguous view", 4, all_experts, contiguous=False),
        ]
    every = -(-region.num_experts // max(region.top_k, 1)) + 3
    cases = [
        Case("every expert hit", every, all_experts, required=True),
        Case("one token", 1, all_experts, minimal=True),
        Case("tokens in a non-contiguous view", 4, all_experts, contiguous=False),
    ]
    if region.top_k < region.num_experts:
        cases.insert(1, Case("one expert empty", 5, _without_first, required=True))
    if region.sentinels:
        cases.append(Case("sentinel ids", 6, _with_sentinels, required=True))
    if region.capacity is not None and region.capacity <= MOST_PLACES:
        cases.append(Case("more rows than places", region.capacity + 3, _all_alike))
    return cases


def all_experts(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    """One expert after the other, from a random one on."""
    start = torch.randint(experts, (1,), generator=generator)
    return (torch.arange(tokens * top_k) + start).remainder(experts).view(tokens, top_k)


def _without_first(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    return all_experts(tokens, top_k, max(experts - 1, 1), generator) + (1 if experts > 1 else 0)


def _all_alike(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    """All tokens go to the same experts."""
    return torch.arange(top_k).remainder(experts).expand(tokens, top_k).contiguous()


def _with_sentinels(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    ids = all_experts(tokens, top_k, experts, generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.4, experts, ids)


def dimensions_to_try(region: MoERegion, old: Dimensions, case: Case) -> Iterator[Dimensions]:
    """Sizes for a case, smallest first; the last ones are those of the graph, if they are small enough."""
    for hidden, width in _feature_sizes(old):
        for tokens in _token_sizes(old.tokens, case):
            new = Dimensions(tokens, hidden, width)
            if _bytes(region, old, new) <= MOST_BYTES:
                yield new


def _feature_sizes(old: Dimensions) -> list[tuple[int, int]]:
    hidden, width = _shrunk(old.hidden), _shrunk(old.width)
    if hidden == width and old.hidden != old.width:  # a mistaken H for I must not go unnoticed
        hidden, width = (hidden, width + 8) if width + 8 <= old.width else (hidden + 8, width)
    return list(dict.fromkeys([(hidden, width), (old.hidden, width), (hidden, old.width), (old.hidden, old.width)]))


def _shrunk(size: int) -> int:
    """A small size that is as divisible by 8 as the real one: alignment decides which kernels accept an operand."""
    return size if size <= LARGEST_REPLAYED else 48 + size % 8


def _token_sizes(old: tuple[int, ...], case: Case) -> list[tuple[int, ...]]:
    """The tokens that the case wants in the last, or the first, of the leading sizes; and the sizes of the graph."""
    sizes = {_with_product(old, at, case.tokens) for at in (0, len(old) - 1)}
    found = dict.fromkeys([*sorted(sizes, key=lambda s: (math.prod(s), s)), old])
    return [s for s in found if not case.minimal or s in sizes]


def _with_product(sizes: Sequence[int], at: int, wanted: int) -> tuple[int, ...]:
    others = math.prod(sizes[:at]) * math.prod(sizes[at + 1 :])
    return (*sizes[:at], max(1, -(-wanted // max(others, 1))), *sizes[at + 1 :])


def rounds_of(region: MoERegion, case: Case, tokens: int) -> int:
    """How often to repeat a case that is to hit every expert with ``tokens`` tokens."""
    if case.ids is not all_experts or not case.required or region.batched or tokens == 0:
        return 1
    return min(MOST_ROUNDS, -(-region.num_experts // (tokens * region.top_k)))


def _bytes(region: MoERegion, old: Dimensions, new: Dimensions) -> int:
    """About how much memory the weights and the rows take."""
    firsts = [(p.weights[0].example, len(p.weights)) for p in region.projections]
    dense = sum(count * weight.numel() * weight.element_size() for weight, count in firsts)
    scale = (new.hidden * new.width) / (old.hidden * old.width)
    rows = new.rows * max(region.top_k, 1) * (new.hidden + 2 * new.width) * 8
    return int(dense * scale) + rows
