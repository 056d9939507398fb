"""Scores over all experts, then their top-k: mixtral, minimax, qwen, olmoe, deepseek_v2, flint (sigmoid)."""

from __future__ import annotations

from samoyeds_compile.match.region import require
from samoyeds_compile.routers.parts import Choice, read_scores
from samoyeds_compile.routers.region import RouterRegion, Spec, close_region
from samoyeds_compile.routers.tail import read_tail


def match_softmax_topk(choice: Choice) -> RouterRegion:
    """The router around a top-k of scores.

    Raises:
        Decline: it is none, or something outside depends on its inside.
    """
    scores = choice.source
    logits, score_dtype = read_scores(scores)
    same = choice.gathered_from in (None, scores)
    require(same, "the weights are gathered from other scores than those chosen from", choice.weights)
    weights, tail = read_tail(choice.weights)
    spec = Spec(
        scoring=scores.op,
        order="score_then_topk",
        top_k=choice.top_k,
        sorted=choice.sorted,
        weights_from="choice" if choice.gathered_from is None else "scores",
        score_dtype=score_dtype,
        **tail,
    )
    return close_region(spec, logits, None, choice.ids, weights)
