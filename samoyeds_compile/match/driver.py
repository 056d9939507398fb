"""Run every family over every (sub)graph: regions, and near-misses with the first failed condition."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.dispatched import Dispatched
from samoyeds_compile.match.experts import MATRIX_PRODUCTS
from samoyeds_compile.match.gathered import Gathered
from samoyeds_compile.match.grouped import Grouped
from samoyeds_compile.match.region import Candidate, Decline, Family, MoERegion, NearMiss, Unlike
from samoyeds_compile.match.sorted_rows import SortedRows
from samoyeds_compile.match.written import Written

MOST_COMBINING = 256
"""How many values to look at between the experts and the output of a block."""

logger = logging.getLogger(__name__)

FAMILIES: tuple[Family, ...] = (Grouped(), Gathered(), Written(), Dispatched(), SortedRows())


def match_regions(
    graphs: Sequence[ValueGraph], families: Sequence[Family] = FAMILIES
) -> tuple[list[MoERegion], list[NearMiss]]:
    """All regions of all graphs, in order, and everything that was nearly one.

    Regions never overlap: of two that claim the same value the first stands. What one family misses and another
    matches is no near-miss.
    """
    regions: list[MoERegion] = []
    misses: list[NearMiss] = []
    for graph in graphs:
        taken: set[Value] = set()
        missed: dict[Value, NearMiss] = {}
        for family in families:
            for found in _match_family(family, graph, taken):
                if isinstance(found, MoERegion):
                    regions.append(found)
                else:
                    missed.setdefault(found.anchor, found)
        misses += [miss for miss in missed.values() if miss.at not in taken and not _rests_on(miss.anchor, taken)]
    return regions, misses


def _rests_on(anchor: Value, taken: set[Value]) -> bool:
    """Whether an anchor belongs to a region, or only combines what one computes."""
    seen, queue = {anchor}, deque([anchor])
    while queue and len(seen) < MOST_COMBINING:
        value = queue.popleft()
        if value in taken:
            return True
        if value is anchor or value.op not in MATRIX_PRODUCTS:
            fresh = [o for o in value.operands if o not in seen and o.is_tensor]
            seen.update(fresh)
            queue.extend(fresh)
    return False


def _match_family(family: Family, graph: ValueGraph, taken: set[Value]) -> Iterator[MoERegion | NearMiss]:
    """Regions, whose values become ``taken``, and near-misses."""
    for candidate in _candidates(family, graph):
        if candidate.anchor in taken:
            continue
        found = _match_candidate(family, graph, candidate)
        if isinstance(found, MoERegion):
            if not taken.isdisjoint(found.members):
                continue
            taken.update(found.members)
        if found is not None:
            yield found


def _candidates(family: Family, graph: ValueGraph) -> list[Candidate]:
    try:
        return family.candidates(graph)
    except Exception:  # a defect of the rule must not break the user's model
        logger.warning("rule %s failed to scan a graph; it is left out", family, exc_info=True)
        return []


def _match_candidate(family: Family, graph: ValueGraph, candidate: Candidate) -> MoERegion | NearMiss | None:
    try:
        return candidate.match()
    except Unlike:
        return None
    except Decline as decline:
        logger.debug("%s declines at %s: %s", family, decline.at, decline.reason)
        return NearMiss(family.name, graph, candidate.anchor, decline.reason, decline.at)
    except Exception as error:  # a defect of the rule must not break the user's model
        logger.warning("rule %s failed at %s; the block is left as it is", family, candidate.anchor, exc_info=True)
        reason = f"internal error of the rule: {type(error).__name__}: {error}"
        return NearMiss(family.name, graph, candidate.anchor, reason, candidate.anchor)
