"""The top-k of the logits, then scores of the chosen: granitemoe, aria, gpt_oss, cohere2_moe, kolibri1 (sigmoid)."""

from __future__ import annotations

from samoyeds_compile.match.region import require
from samoyeds_compile.routers.parts import SCORES, Choice, read_bias, read_scores
from samoyeds_compile.routers.region import RouterRegion, Spec, close_region
from samoyeds_compile.routers.tail import read_tail


def match_topk_softmax(choice: Choice) -> RouterRegion:
    """The router around a top-k of logits.

    Raises:
        Decline: it is none, or something outside depends on its inside.
    """
    logits = choice.source if choice.gathered_from is None else choice.gathered_from
    bias = read_bias(choice.source, logits)
    chosen = choice.weights
    scorers = [user for user in chosen.users if user.op in SCORES]
    require(scorers, "neither before nor after the choice is there a softmax or sigmoid", chosen)
    scores = scorers[0]
    scored, score_dtype = read_scores(scores)
    require(scored is chosen, "the chosen logits are not what the softmax or sigmoid reads", scores)
    weights, tail = read_tail(scores)
    spec = Spec(
        scoring=scores.op,
        order="topk_then_score",
        top_k=choice.top_k,
        sorted=choice.sorted,
        weights_from="choice" if choice.gathered_from is None else "scores",
        score_dtype=score_dtype,
        **tail,
    )
    return close_region(spec, logits, bias, choice.ids, weights)
