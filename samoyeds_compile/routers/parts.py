"""Pieces that the router families share: the top-k, where the weights come from, scores, and what follows them.

Each reader names every argument that it understands and declines a call with any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import require

SCORES = ("softmax", "sigmoid")
LAST = (-1, 1, (-1,), (1,))
"""The last dimension of a matrix, as the ops take it."""
_KEEP_IDS = ("to", "contiguous", "detach", "reshape", "view")


@dataclass(frozen=True)
class Choice:
    """The top-k that picks the experts, and what the routing weights start from.

    Attributes:
        ids: its indices, [T, K].
        source: what it picks from, [T, E].
        weights: the first routing weights, [T, K]: its values, or what was gathered at the ids.
        gathered_from: what they were gathered from, [T, E]; None if they are the values.
        top_k: K.
        sorted: as the call has it.
    """

    ids: Value
    source: Value
    weights: Value
    gathered_from: Value | None
    top_k: int
    sorted: bool


def has_only(value: Value, *names: str) -> bool:
    """Whether the call has no other arguments than these."""
    return set(value.args) <= set(names)


def is_number(value: Any) -> bool:
    """Whether an argument is a plain number, and no symbolic one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_choice(expert_ids: Value) -> Choice:
    """The top-k behind the expert ids.

    Raises:
        Decline: the ids come from something else, or the weights from neither its values nor a gather at its indices.
    """
    ids = expert_ids
    while ids.op in _KEEP_IDS:
        ids = ids.input
    indices = ids.op == "item" and ids.arg("key") == 1 and ids.input.op == "topk"
    require(indices, "the expert ids are not the indices of a top-k", ids)
    topk = ids.input
    require_topk(topk)
    source: Value = topk.input
    sizes = len(source.shape) == 2 and isinstance(source.shape[1], int)
    require(sizes, "the experts are not chosen from a [T, E] tensor of static width", topk)
    require(source.dtype is not None and source.dtype.is_floating_point, "the scores are not floating", source)
    weights, gathered_from = _first_weights(topk, ids)
    return Choice(ids, source, weights, gathered_from, int(topk.arg("k")), bool(topk.arg("sorted", True)))


def require_topk(topk: Value) -> None:
    """A top-k of the largest along the last dimension, with a static k and no result that is taken out twice."""
    known = has_only(topk, "input", "k", "dim", "largest", "sorted") and isinstance(topk.arg("sorted", True), bool)
    require(known and isinstance(topk.arg("k"), int), "the top-k has arguments that are not understood", topk)
    require(topk.arg("largest", True) is True, "the top-k takes the smallest", topk)
    last = topk.arg("dim", -1) in (-1, len(topk.input.shape) - 1)
    require(last, "the top-k is not over the last dimension", topk)
    keys = [item.arg("key") for item in topk.users if item.op == "item"]
    simple = len(keys) == len(topk.users) == len(set(keys)) and set(keys) <= {0, 1}
    require(simple, "the results of the top-k are taken apart in an unusual way", topk)


def _first_weights(topk: Value, ids: Value) -> tuple[Value, Value | None]:
    values = [item for item in topk.users if item.arg("key") == 0 and item.users]
    if values:
        return values[0], None
    gathers = [u for u in ids.users if u.op == "gather" and u.arg("index") is ids]
    require(len(gathers) == 1, "the routing weights are neither the top-k's values nor gathered at its indices", ids)
    (gather,) = gathers
    plain = has_only(gather, "input", "dim", "index") and gather.arg("dim") in (-1, 1)
    require(plain, "the routing weights are not gathered along the experts", gather)
    same = gather.input.shape[1:] == topk.input.shape[1:] and len(gather.input.shape) == 2
    require(same, "the routing weights are gathered from a tensor of another width", gather)
    return gather, gather.input


def read_scores(scores: Value) -> tuple[Value, torch.dtype | None]:
    """(logits, dtype argument) of a softmax over the last dimension of a matrix, or of a sigmoid.

    Raises:
        Decline: it is something else.
    """
    require(scores.op in SCORES, "the scores are neither a softmax nor a sigmoid", scores)
    if scores.op == "sigmoid":
        require(has_only(scores, "input"), "the sigmoid has arguments that are not understood", scores)
        return scores.input, None
    known = has_only(scores, "input", "dim", "dtype", "_stacklevel")
    dtype = scores.arg("dtype")
    known = known and (dtype is None or isinstance(dtype, torch.dtype))
    require(known, "the softmax has arguments that are not understood", scores)
    require(scores.arg("dim") in (-1, 1), "the softmax is not over the experts", scores)
    return scores.input, dtype


def read_bias(biased: Value, scores: Value) -> Value | None:
    """The correction in ``scores + bias``, [E] or [1, E]; None if both are the same value.

    Raises:
        Decline: ``biased`` is anything else.
    """
    if biased is scores:
        return None
    added = biased.op == "add" and has_only(biased, "input", "other", "alpha") and biased.arg("alpha", 1) == 1
    operands = [biased.input, biased.arg("other")] if added else []
    require(scores in operands, "the weights are gathered from other scores than those chosen from", biased)
    operands.remove(scores)
    bias: Value = operands[0]
    experts = scores.shape[1]
    fits = isinstance(bias, Value) and bias.shape in ((experts,), (1, experts))
    require(fits, "what is added to the scores is no bias for each expert", biased)
    dtypes = [v.dtype for v in (scores, bias) if v.dtype is not None]
    promoted = len(dtypes) == 2 and biased.dtype == torch.promote_types(*dtypes)
    require(promoted, "adding the bias in place keeps the dtype of the scores", biased)
    return bias
