"""Blocks written in any other way, recognised by what they compute (see `samoyeds_compile.match.notation`).

Candidates come from the expert ids: what is computed from them by masks, gathers and tables is the dispatch; the last
op that brings the dispatch and the rows of products together is where the block's output is near.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator
from functools import partial

import torch

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.experts import collect_members
from samoyeds_compile.match.notation.block import Block
from samoyeds_compile.match.notation.family import NotationFamily
from samoyeds_compile.match.notation.index import sizes_of
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Products
from samoyeds_compile.match.region import Candidate, Decline, MoERegion, Unlike, is_int_tensor, leaves

_CHOICES = frozenset(("topk", "argmax", "max", "sort", "argsort", "multinomial"))
_DISPATCH = frozenset(
    "view reshape flatten unflatten squeeze unsqueeze permute transpose t getattr slice select narrow item chunk split "
    "unbind index index_select gather take_along_dim repeat_interleave repeat tile expand expand_as contiguous clone "
    "detach stack cat to type_as eq ne ge gt lt le one_hot where nonzero sort argsort cumsum bincount histc sum any "
    "amax scatter scatter_add index_put masked_fill mul add sub div floor_divide remainder sigmoid softmax logical_not "
    "logical_and bitwise_not bitwise_and invert and_ arange empty_like zeros_like max embedding".split()
)
"""Ops by which routing turns into masks, permutations, rows and tables of weights."""

_ACCUMULATIONS = frozenset(("index_add", "scatter_reduce"))

LOOKS_LIKE_A_BLOCK = 2
"""How far (`Block.reached`) a reading must get for its failure to be worth reporting."""

NEAR = 40
"""How many values after the last use of the dispatch to try as the block's output."""

MOST_NARROWS = 12
"""How many values further on to try, through which everything flows."""


class Written(NotationFamily):
    """Blocks recognised by what they compute."""

    name = "written"
    summary = "any other way: loops over experts, masks, einsums, dense tables, accumulation by index"

    def candidates(self, graph: ValueGraph) -> list[Candidate]:
        """One for each tensor of expert ids whose dispatch meets products."""
        notation = Notation(graph)
        products = Products(notation, self.grouped)
        found = []
        for ids in _expert_ids(graph):
            meetings = _meetings(ids, products)
            served = any(u.op.startswith("samoyeds::") for u in ids.users)  # an integration wrote our op for them
            if meetings and not served:
                anchor = max(meetings, key=lambda v: v.position)
                found.append(Candidate(anchor, partial(_match, graph, notation, products, anchor)))
        return found


def _expert_ids(graph: ValueGraph) -> Iterator[Value]:
    """Integer tensors that a choice produces or that come from outside."""
    for value in graph.values:
        if not is_int_tensor(value) or not 1 <= len(value.shape) <= 3:
            continue
        chosen = value.op in ("argmax", "argsort", "multinomial") and _is_floating(value.input)
        second = value.op == "item" and value.arg("key") == 1
        chosen = chosen or (second and value.input.op in _CHOICES and _is_floating(value.input.input))
        looked_up = value.op in ("index", "embedding", "gather")
        if chosen or looked_up or value.node.op in ("placeholder", "get_attr"):
            yield value


def _is_floating(value: Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point


def _meetings(ids: Value, products: Products) -> list[Value]:
    """Where what is computed from the ids meets rows: products, and ops that weigh, move or add up rows.

    Values are visited in the order of the graph. What follows a meeting are results; where these meet more of the
    dispatch is a meeting again. The search ends where the dispatch has no more readers.
    """
    given = ids.node.op in ("placeholder", "get_attr")  # perhaps no ids of experts but those of words
    dispatch: set[Value] = {ids}
    masks: set[Value] = {ids}  # what is computed from ids alone
    results: set[Value] = set()
    waiting = {u.position: u for u in ids.users}
    readers = set(waiting)  # positions of readers of the dispatch that wait
    order = sorted(waiting)
    meetings: list[Value] = []
    while readers:
        position = heapq.heappop(order)
        value, reads = waiting.pop(position), position in readers
        readers.discard(position)
        is_result = any(o in results for o in value.operands)
        if is_result or (reads and (products.is_product(value) or _handles_rows(value, masks))):
            results.add(value)
            if reads and _is_floating(value) and len(value.shape) >= 2:
                meetings.append(value)
        elif value.op in _DISPATCH and not (given and value.op == "embedding"):
            dispatch.add(value)
            if all(o in masks for o in value.operands if o.is_tensor):
                masks.add(value)
        else:
            continue
        for user in value.users:
            if user.position not in waiting:
                waiting[user.position] = user
                heapq.heappush(order, user.position)
            if value in dispatch:
                readers.add(user.position)
    return meetings


def _handles_rows(user: Value, masks: set[Value]) -> bool:
    """Whether an op weighs rows, adds them up by index, or writes them by index."""
    if user.op in _ACCUMULATIONS or _weighs_rows(user, masks):
        return True
    if user.op == "index_put" and _is_floating(user.input):
        tensors = [i for i in user.arg("indices") if isinstance(i, Value)]
        spans = sum(len(i.shape) if i.dtype == torch.bool else 1 for i in tensors)
        return spans < len(user.input.shape)  # a table of weights is written entry by entry
    by_row = user.op in ("scatter", "scatter_add") and user.arg("dim") in (0, -2)
    return by_row and _is_floating(user.input) and len(user.input.shape) == 2


def _weighs_rows(user: Value, masks: set[Value]) -> bool:
    """Whether rows, and not the rows of a table of masks, are multiplied with one number each."""
    other = user.arg("other")
    if user.op != "mul" or not isinstance(other, Value) or not isinstance(user.input, Value):
        return False
    by_width = {sizes_of(v)[-1]: v for v in (user.input, other) if v.shape}
    wide = next((v for size, v in by_width.items() if size != 1), None)
    return 1 in by_width and wide is not None and wide not in masks


def _match(graph: ValueGraph, notation: Notation, products: Products, anchor: Value) -> MoERegion:
    best: tuple[int, Decline] | None = None
    found: MoERegion | None = None
    for output in _outputs(anchor):
        block = Block(graph, notation, products, output)
        try:
            region = block.region()
            collect_members(region)
        except Decline as decline:
            if best is None or block.reached >= best[0]:
                best = (block.reached, decline)
            continue
        if found is None or _is_larger(region, found):
            found = region
        if found.expert_weights is not None and _takes_all_slots(found):
            return found
    if found is not None:
        return found
    if best is None or best[0] < LOOKS_LIKE_A_BLOCK:
        raise Unlike("nothing here looks like the output of a block", anchor)
    raise best[1]


def _takes_all_slots(region: MoERegion) -> bool:
    """Whether the ids are a table [T, K] as such, and no part or flat form of one with more slots."""
    table = next(leaves(region.expert_ids))
    return len(table.shape) < 2 or table.shape[-1] == region.top_k


def _is_larger(region: MoERegion, than: MoERegion) -> bool:
    """Whether a region takes in the weighting or the sum over slots, which the other leaves outside."""
    return region.top_k > than.top_k or (region.expert_weights is not None and than.expert_weights is None)


def _outputs(anchor: Value) -> Iterator[Value]:
    """Values after the anchor that may be the block's output: the nearest ones, then those that all else flows into."""
    tried = set()
    for value in itertools.chain(_nearest(anchor), itertools.islice(_narrows(anchor), MOST_NARROWS)):
        rows = _is_floating(value) and len(value.shape) >= 2 and isinstance(sizes_of(value)[-1], int)
        if rows and value not in tried:
            tried.add(value)
            yield value


def _nearest(anchor: Value) -> Iterator[Value]:
    seen, queue = {anchor}, [anchor]
    while queue and len(seen) < NEAR:
        value = queue.pop(0)
        yield value
        for user in sorted(value.users, key=lambda u: u.position):
            if user not in seen:
                seen.add(user)
                queue.append(user)


def _narrows(anchor: Value) -> Iterator[Value]:
    """Values through which every way leads that numbers take from the anchor on: where unrolled experts end."""
    waiting = {anchor.position: anchor}
    order = [anchor.position]
    while order:
        value = waiting.pop(heapq.heappop(order))
        if not order:
            yield value
        for user in value.users:
            if user.position not in waiting and (_is_floating(user) or user.op in ("split", "chunk", "unbind")):
                waiting[user.position] = user
                heapq.heappush(order, user.position)
