"""``samoyeds::router``: logits to routing weights and expert ids, in one op.

The body calls the ops that the routers of models call, in the same order and on the same numbers, so that ids, ties and
order are those of `torch.topk` on the same scores. Only the group limit is computed in another way (by comparison
instead of a scatter), which yields the same booleans.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from samoyeds_codegen.cpp.ops import has_ops_library
from samoyeds_compile.ops.library import bad_operand, define_composite, define_opaque

SCORINGS = ("softmax", "sigmoid")
ORDERS = ("score_then_topk", "topk_then_score")
WEIGHTS_FROM = ("choice", "scores")
RENORMALISE = ("none", "sum", "clamped_sum")
GROUP_SCORES = ("top2_sum", "max")
DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
"""That the op in C++ reads and writes."""


def router(
    logits_TE: Tensor,
    correction_bias_E: Tensor | None,
    scoring: str,
    order: str,
    top_k: int,
    sorted: bool,
    weights_from: str,
    renormalise: str,
    epsilon: float,
    scale: float | None,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_sorted: bool,
    masked_score: float,
    score_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Choose K experts for each token and weigh them.

    With ``scores = score(logits)``, or ``scores = logits`` if the order is ``topk_then_score``: the choice is the top-k
    of ``scores + correction_bias`` within the best ``topk_group`` of ``n_group`` groups of neighbouring experts. The
    weights are what was chosen from (``weights_from="choice"``: masked, where groups mask) or the scores at the ids
    (``"scores"``: neither masked nor with the bias), and then scored if that is still to be done, renormalised, scaled
    and cast.
    Differentiable in the logits, and in the bias where it is part of the weights.

    Args:
        logits_TE: floating.
        correction_bias_E: added to the scores for the choice; [E] or [1, E].
        scoring: ``softmax`` over the experts (over the chosen ones, if scored after the choice) or ``sigmoid``.
        order: ``score_then_topk`` or ``topk_then_score``.
        top_k: K.
        sorted: as `torch.topk` takes it.
        weights_from: ``choice`` or ``scores``.
        renormalise: ``none``; ``sum``: divide by ``sum + epsilon``; ``clamped_sum``: by ``max(sum, epsilon)``.
        epsilon: see ``renormalise``.
        scale: factor of the weights; None for none.
        n_group: number of groups; 1 for no group limit, and then the next four arguments mean nothing.
        topk_group: how many groups a token may use.
        group_score: a group counts as the sum of its two best (``top2_sum``) or as its best (``max``) expert.
        group_sorted: ``sorted`` of the top-k over groups.
        masked_score: what the experts of the other groups score.
        score_dtype: the ``dtype`` argument of the softmax.
        out_dtype: dtype of the weights; None leaves them as they are.

    Returns:
        weights_TK and ids_TK (int64).

    Raises:
        OperandError: an operand does not fit the others.
    """
    _check(logits_TE, correction_bias_E, top_k, n_group, topk_group, group_score)
    _check_names(scoring, order, weights_from, renormalise, group_score)
    attributes = (scoring, order, top_k, sorted, weights_from, renormalise, epsilon, scale, n_group, topk_group,
                  group_score, group_sorted, masked_score, score_dtype, out_dtype)  # fmt: skip
    if not runs_as_one_op(logits_TE, correction_bias_E, score_dtype, out_dtype):
        return _in_aten(logits_TE, correction_bias_E, *attributes)
    how = " ".join(str(attribute).removeprefix("torch.") for attribute in attributes)
    return torch.ops.samoyeds.choose_experts(logits_TE, correction_bias_E, how)  # type: ignore[no-any-return]


def runs_as_one_op(
    logits_TE: Tensor,
    correction_bias_E: Tensor | None,
    score_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> bool:
    """Whether ``samoyeds::choose_experts`` computes a router: in inference on a CPU, where it is C++."""
    tensors = [logits_TE] if correction_bias_E is None else [logits_TE, correction_bias_E]
    if any(t.device.type != "cpu" or (t.requires_grad and torch.is_grad_enabled()) for t in tensors):
        return False
    dtypes = {*(t.dtype for t in tensors), score_dtype, out_dtype} - {None}
    return dtypes <= DTYPES and not torch.is_autocast_enabled("cpu") and has_ops_library()


def choose_experts(logits_TE: Tensor, correction_bias_E: Tensor | None, how: str) -> tuple[Tensor, Tensor]:
    """`router` as one op, for inference; on a CPU it is C++ (`samoyeds_codegen.cpp.ops`), and equal bit for bit.

    Args:
        logits_TE, correction_bias_E: as of `router`.
        how: its other operands as words: one text, as each argument of an op takes time in each call.
    """
    return _in_aten(logits_TE, correction_bias_E, *map(_value, how.split(" ")))


def _value(word: str) -> Any:
    """A name, a number, a truth, a dtype or None from its word."""
    named = {"True": True, "False": False, "None": None, **{str(d).removeprefix("torch."): d for d in DTYPES}}
    if word in named:
        return named[word]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(word)
    return word


def _in_aten(
    logits_TE: Tensor,
    correction_bias_E: Tensor | None,
    scoring: str,
    order: str,
    top_k: int,
    sorted: bool,
    weights_from: str,
    renormalise: str,
    epsilon: float,
    scale: float | None,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_sorted: bool,
    masked_score: float,
    score_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    score_first = order == "score_then_topk"
    scores_TE = _score(logits_TE, scoring, score_dtype) if score_first else logits_TE
    choice_TE = scores_TE if correction_bias_E is None else scores_TE + correction_bias_E
    if n_group > 1:
        choice_TE = _limit_groups(choice_TE, n_group, topk_group, group_score, group_sorted, masked_score)
    weights_TK, ids_TK = torch.topk(choice_TE, top_k, dim=-1, sorted=sorted)
    if weights_from == "scores":
        weights_TK = scores_TE.gather(1, ids_TK)
    if not score_first:
        weights_TK = _score(weights_TK, scoring, score_dtype)
    weights_TK = _renormalise(weights_TK, renormalise, epsilon)
    if scale is not None:
        weights_TK = weights_TK * scale
    return (weights_TK if out_dtype is None else weights_TK.to(out_dtype)), ids_TK


def _score(logits: Tensor, scoring: str, dtype: torch.dtype | None) -> Tensor:
    return logits.softmax(-1, dtype=dtype) if scoring == "softmax" else logits.sigmoid()


def _limit_groups(
    choice_TE: Tensor, n_group: int, topk_group: int, group_score: str, group_sorted: bool, masked_score: float
) -> Tensor:
    """The choice with all experts outside the token's best groups set to ``masked_score``, [T, E]."""
    by_group_TGN = choice_TE.unflatten(1, (n_group, choice_TE.shape[1] // n_group))
    if group_score == "max":
        group_scores_TG = by_group_TGN.max(dim=-1).values
    else:
        group_scores_TG = by_group_TGN.topk(2, dim=-1).values.sum(dim=-1)
    groups = torch.topk(group_scores_TG, topk_group, dim=-1, sorted=group_sorted).indices
    is_open_TG = (groups.unsqueeze(-1) == torch.arange(n_group, device=groups.device)).any(dim=1)
    is_open_TE = is_open_TG.unsqueeze(-1).expand_as(by_group_TGN).flatten(1)
    return choice_TE.masked_fill(~is_open_TE, masked_score)


def _renormalise(weights_TK: Tensor, how: str, epsilon: float) -> Tensor:
    if how == "none":
        return weights_TK
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    if how == "clamped_sum":
        return weights_TK / total_T1.clamp(min=epsilon)
    return weights_TK / (total_T1 + epsilon if epsilon else total_T1)


def _check(logits: Tensor, bias: Tensor | None, top_k: int, n_group: int, topk_group: int, group_score: str) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        found = f"is {logits.dtype} of rank {logits.dim()}"
        raise bad_operand("router", "logits", found, "pass floating point numbers as [T, E]")
    experts = logits.shape[1]
    if bias is not None and tuple(bias.shape) not in ((experts,), (1, experts)):
        remedy = f"pass one number for each of the {experts} experts"
        raise bad_operand("router", "correction_bias", f"has shape {tuple(bias.shape)}", remedy)
    if not 1 <= top_k <= experts:
        raise bad_operand("router", "top_k", f"is {top_k}", f"choose between 1 and {experts} experts")
    if n_group == 1:
        return
    if n_group < 1 or experts % n_group:
        raise bad_operand("router", "n_group", f"is {n_group}", f"pass a divisor of the number of experts, {experts}")
    if not 1 <= topk_group <= n_group:
        raise bad_operand("router", "topk_group", f"is {topk_group}", f"choose between 1 and {n_group} groups")
    if group_score == "top2_sum" and experts // n_group < 2:
        raise bad_operand("router", "n_group", f"is {n_group}", "top2_sum needs two experts a group; use max")


def _check_names(scoring: str, order: str, weights_from: str, renormalise: str, group_score: str) -> None:
    named = {
        "scoring": (scoring, SCORINGS),
        "order": (order, ORDERS),
        "weights_from": (weights_from, WEIGHTS_FROM),
        "renormalise": (renormalise, RENORMALISE),
        "group_score": (group_score, GROUP_SCORES),
    }
    for operand, (name, known) in named.items():
        if name not in known:
            raise bad_operand("router", operand, f"is {name!r}", f"use one of {', '.join(known)}")


OPERANDS = (
    "Tensor logits, Tensor? correction_bias, str scoring, str order, int top_k, bool sorted, str weights_from, "
    "str renormalise, float epsilon, float? scale, int n_group, int topk_group, str group_score, bool group_sorted, "
    "float masked_score, ScalarType? score_dtype, ScalarType? out_dtype"
)
define_composite(f"router({OPERANDS}) -> (Tensor, Tensor)", router)
define_opaque(
    "choose_experts(Tensor logits, Tensor? correction_bias, str how) -> (Tensor, Tensor)",
    choose_experts,
    choose_experts,
)
