"""Scores with a correction for the choice, and a limit on groups: deepseek_v3, glm4_moe, dots1, kimi_linear, ernie4_5.

The choice is made among ``scores + bias``, with the experts outside the best groups masked; the weights are the scores
themselves at the chosen ids (or, in deepseek_v2, what was chosen from). Either part may be missing, and the scores may
be a softmax (ernie4_5, mistral4).
"""

from __future__ import annotations

from typing import Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import require
from samoyeds_compile.routers.parts import Choice, has_only, is_number, read_bias, read_scores, require_topk
from samoyeds_compile.routers.region import RouterRegion, Spec, close_region
from samoyeds_compile.routers.tail import read_tail


def match_sigmoid_group(choice: Choice) -> RouterRegion:
    """The router around a top-k of corrected or masked scores.

    Raises:
        Decline: it is none, or something outside depends on its inside.
    """
    open_choice, groups = choice.source, dict[str, Any]()
    if open_choice.op == "masked_fill":
        open_choice, groups = _read_groups(open_choice)
    scores = open_choice if choice.gathered_from is None else choice.gathered_from
    bias = read_bias(open_choice, scores)
    logits, score_dtype = read_scores(scores)
    weights, tail = read_tail(choice.weights)
    spec = Spec(
        scoring=scores.op,
        order="score_then_topk",
        top_k=choice.top_k,
        sorted=choice.sorted,
        weights_from="choice" if choice.gathered_from is None else "scores",
        score_dtype=score_dtype,
        **groups,
        **tail,
    )
    return close_region(spec, logits, bias, choice.ids, weights)


def _read_groups(masked: Value) -> tuple[Value, dict[str, Any]]:
    """What ``masked_fill`` masks, [T, E], and the group limit as a part of the `Spec`."""
    known = has_only(masked, "input", "mask", "value") and is_number(masked.arg("value"))
    require(known, "the scores are masked with something other than a number", masked)
    source, mask = masked.input, masked.arg("mask")
    best, n_group = _read_mask(mask, source.shape[1])
    topk = best.input
    require_topk(topk)
    group_scores: Value = topk.input
    limit = {
        "n_group": n_group,
        "topk_group": int(topk.arg("k")),
        "group_score": _read_group_scores(group_scores, source, n_group),
        "group_sorted": bool(topk.arg("sorted", True)),
        "masked_score": float(masked.arg("value")),
    }
    return source, limit


def _read_mask(mask: Any, experts: int) -> tuple[Value, int]:
    """The best groups, [T, topk_group], and the number of groups, from the mask that covers all other experts.

    Read from the end: ``~zeros_like(group_scores).scatter_(1, best, 1).unsqueeze(-1).expand(..).reshape(..).bool()``.
    """
    why = "the mask is not built from the indices of the best groups"
    require(isinstance(mask, Value) and mask.op in ("invert", "bitwise_not", "logical_not"), why)
    require(mask.input.dtype == torch.bool, why, mask)
    flat = mask.input.input if mask.input.op == "to" else mask.input
    require(flat.op in ("reshape", "view", "flatten") and flat.shape[1:] == (experts,), why, flat)
    spread = flat.input
    require(spread.op == "expand" and len(spread.shape) == 3 and spread.input.op == "unsqueeze", why, spread)
    column, (n_group, size) = spread.input, spread.shape[1:]
    require(column.arg("dim") in (-1, 2) and column.shape[1:] == (n_group, 1), why, column)
    require(isinstance(n_group, int) and n_group * size == experts, why, spread)
    return _read_scatter(column.input, why), n_group


def _read_scatter(chosen: Value, why: str) -> Value:
    """The indices in ``zeros_like(group_scores).scatter_(1, indices, 1)``."""
    require(chosen.op == "scatter", why, chosen)
    names = {"1": "dim", "2": "index", "3": "value", "src": "value"}
    args = {names.get(name, name): argument for name, argument in chosen.args.items()}
    require(args.keys() == {"input", "dim", "index", "value"} and args["dim"] in (-1, 1), why, chosen)
    zeros, best = args["input"], args["index"]
    require(args["value"] == 1 and zeros.op == "zeros_like" and has_only(zeros, "input", "dtype"), why, chosen)
    indices = isinstance(best, Value) and best.op == "item" and best.arg("key") == 1 and best.input.op == "topk"
    require(indices and best.input.input is zeros.input, why, chosen)
    return best  # type: ignore[no-any-return]


def _read_group_scores(group_scores: Value, source: Value, n_group: int) -> str:
    """``top2_sum`` or ``max`` over the experts of each group of ``source``."""
    why = "the groups are scored by neither the sum of their two best experts nor their best"
    if group_scores.op == "sum":
        name = "top2_sum"
        summed = has_only(group_scores, "input", "dim", "keepdim") and group_scores.arg("dim") in (-1, 2, (-1,), (2,))
        require(summed and not group_scores.arg("keepdim", False), why, group_scores)
        best = group_scores.input
    else:
        name, best = "max", group_scores
    require(best.op == "item" and best.arg("key") == 0, why, best)
    reduced = best.input
    if name == "top2_sum":
        require(reduced.op == "topk" and reduced.arg("k") == 2, why, reduced)
        require_topk(reduced)
    else:
        plain = reduced.op == "max" and has_only(reduced, "input", "dim", "keepdim")
        require(plain and reduced.arg("dim") in (-1, 2) and not reduced.arg("keepdim", False), why, reduced)
    by_group = reduced.input
    grouped = by_group.op in ("view", "reshape", "unflatten") and by_group.shape[1:] == (
        n_group,
        source.shape[1] // n_group,
    )
    require(grouped and by_group.input is source, "the groups are scored by other scores than those masked", by_group)
    return name
