"""Blocks with one-hot dispatch, and edits of each; `test_lookalikes` says what the categories mean."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.styles.edits import EITHER, KEPT, MIDDLE, E, H, T

C = 3
"""Places of an expert; more rows than that choose it."""
MANY = 500
"""The same where many tokens are counted."""


def gshard(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P5: two choices, one-hot dispatch and combination; more rows than places."""
    logits = x @ router
    gates = logits.softmax(-1)
    ids1 = gates.argmax(-1)
    mask1 = F.one_hot(ids1, E)
    ids2 = logits.masked_fill(mask1.bool(), float("-inf")).argmax(-1)
    mask2 = F.one_hot(ids2, E)
    places1 = mask1.cumsum(0) - 1
    kept1 = mask1 * (places1 < C)
    places2 = mask2.cumsum(0) - 1
    places2 = places2 + mask1.sum(0, keepdim=True)
    kept2 = mask2 * (places2 < C)
    place1 = (places1 * kept1).sum(1)
    place2 = (places2 * kept2).sum(1)
    gate1 = (gates * kept1).sum(1)
    gate2 = (gates * kept2).sum(1)
    combine1 = torch.einsum("se,sc->sec", gate1[:, None] * kept1, F.one_hot(place1, C).float())
    combine2 = torch.einsum("se,sc->sec", gate2[:, None] * kept2, F.one_hot(place2, C).float())
    combine = combine1 + combine2
    dispatch = combine.bool().float()
    rows = torch.einsum("sec,sm->ecm", dispatch, x)
    h = F.silu(torch.einsum("ecm,ehm->ech", rows, w1)) * torch.einsum("ecm,ehm->ech", rows, w3)
    y = torch.einsum("ech,emh->ecm", h, w2) + b2[:, None]
    return torch.einsum("sec,ecm->sm", combine, y)


GSHARD = {
    # places of second choices
    "no offset": (MIDDLE, "places2 = places2 + mask1.sum(0, keepdim=True)", "pass"),
    "offset by the wrong mask": (MIDDLE, "places2 + mask1.sum", "places2 + mask2.sum"),
    "offset by the rows kept": (EITHER, "places2 + mask1.sum", "places2 + kept1.sum"),
    "offset by some rows": (MIDDLE, "places2 + mask1.sum", "places2 + mask1[4:].sum"),
    "offset by the rows so far": (MIDDLE, "places2 + mask1.sum(0, keepdim=True)", "places2 + mask1.cumsum(0)"),
    "offset of the next expert": (MIDDLE, "places2 + mask1.sum(0, keepdim=True)", "places2 + mask1.sum(0).roll(1)"),
    "offset by rows that may not be kept": (
        MIDDLE,
        "places2 + mask1.sum",
        "places2 + (mask1 * (x.sum(1, keepdim=True) > 0)).sum",
    ),
    "token after token": (
        EITHER,
        "mask1.cumsum(0) - 1",
        "(mask1 + mask2).cumsum(0) - 1",
        "places2 = places2 + mask1.sum(0, keepdim=True)",
        "places2 = places1",
    ),
    "second choices first": (
        EITHER,
        "mask1.cumsum(0) - 1",
        "mask1.cumsum(0) - 1 + mask2.sum(0, keepdim=True)",
        "places2 = places2 + mask1.sum(0, keepdim=True)",
        "pass",
    ),
    "second choices by another router": (EITHER, 'logits.masked_fill(mask1.bool(), float("-inf"))', "(x @ router2)"),
    "the same choice twice": (EITHER, 'logits.masked_fill(mask1.bool(), float("-inf"))', "logits"),
    # places
    "counted along experts": (MIDDLE, "mask1.cumsum(0)", "mask1.cumsum(1)"),
    "counts of other ids": (MIDDLE, "mask1.cumsum(0) - 1", "F.one_hot((x @ router2).argmax(-1), E).cumsum(0)"),
    "first choices from one": (MIDDLE, "mask1.cumsum(0) - 1", "mask1.cumsum(0)"),
    "both from one": (EITHER, "mask1.cumsum(0) - 1", "mask1.cumsum(0)", "mask2.cumsum(0) - 1", "mask2.cumsum(0)"),
    "the first row of an expert dropped": (
        EITHER,
        "mask1.cumsum(0) - 1",
        "mask1.cumsum(0) - 2",
        "mask2.cumsum(0) - 1",
        "mask2.cumsum(0) - 2",
        "F.one_hot(place1, C)",
        "(place1[:, None] == torch.arange(C))",
        "F.one_hot(place2, C)",
        "(place2[:, None] == torch.arange(C))",
    ),
    "the last ones first": (EITHER, "mask1.cumsum(0) - 1", "mask1.flip(0).cumsum(0).flip(0) - 1"),
    "counts of the tokens in another order": (MIDDLE, "mask1.cumsum(0) - 1", "mask1.flip(0).cumsum(0)"),
    "in the order of a score": (
        EITHER,
        "places1 = mask1.cumsum(0) - 1",
        "order = x.sum(1).argsort(); places1 = mask1[order].cumsum(0)[order.argsort()] - 1",
    ),
    "in the order of a score, not put back": (
        MIDDLE,
        "places1 = mask1.cumsum(0) - 1",
        "order = x.sum(1).argsort(); places1 = mask1[order].cumsum(0)",
    ),
    "modulo the capacity": (
        MIDDLE,
        "kept1 = mask1 * (places1 < C)",
        "kept1 = mask1",
        "(places1 * kept1).sum(1)",
        "(places1 * kept1).sum(1) % C",
    ),
    "the last place for what is left over": (
        MIDDLE,
        "kept1 = mask1 * (places1 < C)",
        "kept1 = mask1",
        "(places1 * kept1).sum(1)",
        "(places1 * kept1).sum(1).clamp(max=C - 1)",
    ),
    "the lowest bit": (MIDDLE, "(places1 * kept1).sum(1)", "(places1 * kept1).sum(1) & 1"),
    "the lowest bit by name": (MIDDLE, "(places1 * kept1).sum(1)", "torch.bitwise_and((places1 * kept1).sum(1), 1)"),
    "whether it is the first place": (MIDDLE, "(places1 * kept1)", "torch.logical_and(places1, kept1)"),
    "half of the place": (MIDDLE, "(places1 * kept1).sum(1)", "(places1 * kept1).sum(1) // 2"),
    "half of the place, rounded": (MIDDLE, "(places1 * kept1).sum(1)", "((places1 * kept1).sum(1) / 2).long()"),
    "twice the place": (
        MIDDLE,
        "(places1 * kept1).sum(1)",
        "(places1 * kept1).sum(1) * 2",
        "F.one_hot(place1, C)",
        "F.one_hot(place1, 2 * C)[:, :C]",
    ),
    "squared": (
        MIDDLE,
        "(places1 * kept1).sum(1)",
        "(places1 * places1 * kept1).sum(1)",
        "F.one_hot(place1, C)",
        "F.one_hot(place1, C * C)[:, :C]",
    ),
    "summed over some experts": (MIDDLE, "(places1 * kept1).sum(1)", "(places1 * kept1)[:, : E - 1].sum(1)"),
    "summed over other experts": (MIDDLE, "(places1 * kept1).sum(1)", "(places1 * kept1)[:, 1:].sum(1)"),
    "the most of all experts": (MIDDLE, "(places1 * kept1).sum(1)", "places1.clamp(0, C - 1).amax(1)"),
    "one place for all": (MIDDLE, "F.one_hot(place1, C)", "F.one_hot(place1 * 0, C)"),
    # who is kept
    "a place more than there are": (
        EITHER,
        "(places1 < C)",
        "(places1 <= C)",
        "F.one_hot(place1, C)",
        "F.one_hot(place1, C + 1)[:, :C]",
    ),
    "a place less than there are": (EITHER, "(places1 < C)", "(places1 < C - 1)"),
    "kept by both places": (EITHER, "mask1 * (places1 < C)", "mask1 * (places1 < C) * (x.sum(1, keepdim=True) > 0)"),
    "kept by and": (EITHER, "mask1 * (places1 < C)", "(mask1.bool() & (places1 < C)).long()"),
    "kept by and not": (EITHER, "mask1 * (places1 < C)", "(mask1.bool() & ~(places1 >= C)).long()"),
    "kept by or": (EITHER, "mask1 * (places1 < C)", "mask1 * ((places1 < C) | (x @ router2 > 9)).long()"),
    "kept by and, weights by and": (
        EITHER,
        "kept1 = mask1 * (places1 < C)",
        "chosen = mask1.bool(); kept1 = chosen & (places1 < C)",
    ),
    "only those who come too late": (
        EITHER,
        "mask1.cumsum(0) - 1",
        "mask1.cumsum(0) - 1 - 2",
        "(places1 < C)",
        "(places1 >= 0)",
        "F.one_hot(place1, C)",
        "F.one_hot(place1, T)[:, :C]",
        "places2 + mask1",
        "places2 + 2 * mask1",
    ),
    "nobody dropped from the mask": (MIDDLE, "kept1 = mask1 * (places1 < C)", "kept1 = mask1",
                                     "(places1 * kept1)", "(places1 * (places1 < C) * kept1)"),
    # dispatch
    "a soft dispatch": (MIDDLE, "combine.bool().float()", "combine"),
    "a dispatch of twos": (MIDDLE, "combine.bool().float()", "combine.bool().float() * 2"),
    "the dispatch negated": (MIDDLE, "combine.bool().float()", "(combine == 0).float()"),
    "a dispatch of large weights": (MIDDLE, "combine.bool().float()", "(combine > 0.3).float()"),
    "a dispatch of some tokens": (
        MIDDLE,
        "combine.bool().float()",
        "combine.bool().float() * (x.sum(1) > 0)[:, None, None]",
    ),
    "a dispatch of the first choice": (MIDDLE, "combine.bool().float()", "combine1.bool().float()"),
    "a dispatch of the first choice twice": (
        MIDDLE,
        "combine.bool().float()",
        "combine1.bool().float() + combine.bool().float()",
    ),
    "a dispatch of all first choices": (
        MIDDLE,
        "combine.bool().float()",
        "torch.einsum('se,sc->sec', mask1, F.one_hot(place1, C)).float()",
    ),
    "a dispatch by other ids": (
        MIDDLE,
        "combine.bool().float()",
        "torch.einsum('se,sc->sec', F.one_hot((x @ router2).argmax(-1), E).float(), F.one_hot(place1, C).float())",
    ),
    "a dispatch where another number is not 0": (
        MIDDLE,
        "combine.bool().float()",
        "(combine * F.relu(x[:, :1, None])).bool().float()",
    ),
    "a dispatch where one of two masks holds": (
        MIDDLE,
        "combine.bool().float()",
        "combine.bool().float() * ((x[:, 0] > 0).float() + (x[:, 1] > 0).float()).bool().float()[:, None, None]",
    ),
    "a combination where neither of two masks holds": (
        EITHER,
        "dispatch = combine.bool()",
        "combine = combine * (~((x[:, 0] > 0).float() + (x[:, 1] > 0).float()).bool()).float()[:, None, None]\n"
        "    dispatch = combine.bool()",
    ),
    "a dispatch to other places": (MIDDLE, "combine.bool().float()", "combine.bool().float().roll(1, 2)"),
    "a dispatch of negative masks": (MIDDLE, "combine.bool().float()", "-combine.bool().float()"),
    "other rows": (EITHER, '"sec,sm->ecm", dispatch, x', '"sec,sm->ecm", dispatch, x.flip(0)'),
    "weighted rows": (EITHER, '"sec,sm->ecm", dispatch, x', '"sec,sm->ecm", dispatch, x * gate1[:, None]'),
    "rows of other tokens": (EITHER, '"sec,sm->ecm", dispatch', '"sec,sm->ecm", dispatch.flip(0)'),
    "rows with their mean": (EITHER, '"sec,sm->ecm", dispatch, x', '"sec,sm->ecm", dispatch, x - x.mean(0)'),
    "one product of other places": (KEPT, 'rows, w3)', 'rows.flip(1), w3)'),
    # combination
    "read from the next place": (MIDDLE, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine.roll(1, 2)'),
    "read from the next expert": (MIDDLE, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine.roll(1, 1)'),
    "read by other tokens": (EITHER, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine.flip(0)'),
    "only first choices read": (EITHER, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine1'),
    "read by some tokens": (
        EITHER,
        '"sec,ecm->sm", combine',
        '"sec,ecm->sm", combine * (x.sum(1) > 0)[:, None, None]',
    ),
    "read without weights": (EITHER, '"sec,ecm->sm", combine', '"sec,ecm->sm", dispatch'),
    "a mean of the places": (MIDDLE, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine.mean(2, True).expand(T, E, C)'),
    "weights of the other choice": (EITHER, "gate1 = (gates * kept1)", "gate1 = (gates * kept2)"),
    "weights of the other choice only read": (
        EITHER,
        '"sec,ecm->sm", combine',
        '"sec,ecm->sm", combine * gate2[:, None, None]',
    ),
    "weights twice as large": (EITHER, "gate1[:, None] * kept1", "gate1[:, None] * kept1 * 2"),
    "weights cut off": (EITHER, "gate1[:, None] * kept1", "(gate1[:, None] * 3 * kept1).long().float()"),
    "the largest of negatives": (EITHER, "gate1[:, None] * kept1", "gate1[:, None] * kept1 * (-kept1).amax(1, True)"),
    "weights of another place": (MIDDLE, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine * torch.arange(C)'),
    "fewer experts than are chosen": (
        EITHER,
        "combine = combine1 + combine2",
        "combine, w1, w3, w2, b2 = (combine1 + combine2)[:, :2], w1[:2], w3[:2], w2[:2], b2[:2]",
    ),
    "all but the last expert": (
        EITHER,
        "combine = combine1 + combine2",
        "combine, w1, w3, w2, b2 = (combine1 + combine2)[:, :3], w1[:3], w3[:3], w2[:3], b2[:3]",
    ),
    "all but the first expert": (
        EITHER,
        "combine = combine1 + combine2",
        "combine, w1, w3, w2, b2 = (combine1 + combine2)[:, 1:], w1[1:], w3[1:], w2[1:], b2[1:]",
    ),
    # masks
    "only the first tokens choose": (
        EITHER,
        "F.one_hot(ids1, E)",
        "torch.zeros(T, E, dtype=torch.int64).scatter(1, ids1[:10, None], 1)",
    ),
    "kept where a score is positive": (EITHER, "mask1 * (places1 < C)", "mask1 * (places1 < C) * (x @ router2 > 0)"),
    "counted where a score is positive": (
        EITHER,
        "mask1 = F.one_hot(ids1, E)",
        "mask1 = F.one_hot(ids1, E) * (x @ router2 > 0)",
    ),
    "counted twice where a score is positive": (
        EITHER,
        "mask1.cumsum(0) - 1",
        "(mask1 * (1 + (x @ router2 > 0).long())).cumsum(0) - 1",
    ),
    "experts closed": (EITHER, "mask1 * (places1 < C)", "mask1 * (places1 < C) * (b1[:, 0] > 0)"),
    "experts closed to the dispatch": (
        MIDDLE,
        "combine.bool().float()",
        "combine.bool().float() * (b1[:, 0] > 0)[:, None]",
    ),
    "places closed to the dispatch": (MIDDLE, "combine.bool()", "combine.bool() * (torch.arange(C) > 0)"),
    "the mask of either choice": (EITHER, "(places1 < C)", "(places1 < C) * ((mask1 + mask2) > 0)"),
    # other spellings, and what is close to them
    "places gathered": (EITHER, "(places1 * kept1).sum(1)", "(places1 * kept1).gather(1, ids1[:, None]).squeeze(1)"),
    "places gathered by other ids": (
        MIDDLE,
        "(places1 * kept1).sum(1)",
        "(places1 * kept1).gather(1, ids2[:, None]).squeeze(1)",
    ),
    "the largest place": (EITHER, "(places1 * kept1).sum(1)", "(places1 * kept1).amax(1)"),
    "picked by where": (EITHER, "(places1 * kept1).sum(1)", "torch.where(kept1 > 0, places1, 0).sum(1)"),
    "picked by where, the others one": (
        EITHER,
        "(places1 * kept1).sum(1)",
        "torch.where(kept1 > 0, places1, 1).sum(1)",
        "F.one_hot(place1, C)",
        "F.one_hot(place1, C + E)[:, :C]",
    ),
    "compared with places": (EITHER, "F.one_hot(place1, C)", "(place1[:, None] == torch.arange(C))"),
    "compared with places from one": (EITHER, "F.one_hot(place1, C)", "(place1[:, None] == torch.arange(1, C + 1))"),
    "compared with places backwards": (EITHER, "F.one_hot(place1, C)", "(place1[:, None] == torch.arange(C).flip(0))"),
    "compared with every other place": (EITHER, "F.one_hot(place1, C)", "(place1[:, None] == 2 * torch.arange(C))"),
    "compared with other places": (EITHER, "F.one_hot(place1, C)", "(place1[:, None] <= torch.arange(C))"),
    "fewer places": (EITHER, "combine = combine1 + combine2", "combine = (combine1 + combine2)[:, :, : C - 1]"),
    "all but the first place": (EITHER, "combine = combine1 + combine2", "combine = (combine1 + combine2)[:, :, 1:]"),
    "weights squared": (EITHER, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine * combine'),
    "weights of the experts": (EITHER, '"sec,ecm->sm", combine', '"sec,ecm->sm", combine * b1[:, :1]'),
    "weights of other tokens": (EITHER, "gate1[:, None] * kept1", "gate1.flip(0)[:, None] * kept1"),
    "weights of the rows of an expert": (
        EITHER,
        '"sec,ecm->sm", combine',
        '"sec,ecm->sm", combine / combine.sum((0, 2), keepdim=True).clamp(min=0.1)',
    ),
    "places mixed": (MIDDLE, "dispatch, x)", "dispatch, x); rows = rows + rows.roll(1, 1)"),
    "reads the rows": (EITHER, 'combine, y)', 'combine, y), rows.sum(0), dispatch.sum(0)'),
}  # fmt: skip


def switch(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P5: one choice, two places of an expert within each of two sequences."""
    x = x.view(2, T // 2, H)
    gate, ids = (x @ router).softmax(-1).max(-1)
    mask = F.one_hot(ids, E).float()
    position = torch.cumsum(mask, 1) * mask - 1.0
    kept = mask * (position < 2).float()
    place = F.one_hot((position * kept).sum(-1).long(), 2).float()
    dispatch = kept[..., None] * place[..., None, :]
    combine = gate[..., None, None] * dispatch
    rows = torch.einsum("bsec,bsm->ebcm", dispatch, x)
    h = F.silu(torch.einsum("ebcm,ehm->ebch", rows, w1)) * torch.einsum("ebcm,ehm->ebch", rows, w3)
    y = torch.einsum("ebch,emh->ebcm", h, w2) + b2[:, None, None]
    return torch.einsum("bsec,ebcm->bsm", combine, y)


SWITCH = {
    "counted over both sequences": (EITHER, "torch.cumsum(mask, 1)", "mask.view(T, E).cumsum(0).view(2, -1, E)"),
    "counted along sequences": (MIDDLE, "torch.cumsum(mask, 1)", "torch.cumsum(mask, 0)"),
    "counted in the other sequence": (MIDDLE, "torch.cumsum(mask, 1) * mask - 1.0",
                                      "(torch.cumsum(mask.flip(0), 1) * mask - 1.0).clamp(min=0)"),
    "not masked": (EITHER, "torch.cumsum(mask, 1) * mask", "torch.cumsum(mask, 1)"),
    "rows before": (EITHER, "torch.cumsum(mask, 1) * mask - 1.0", "F.pad(mask, (0, 0, 1, -1)).cumsum(1)"),
    "rows before, less one": (MIDDLE, "torch.cumsum(mask, 1) * mask - 1.0",
                              "(F.pad(mask, (0, 0, 1, -1)).cumsum(1) - 1.0).clamp(min=0)"),
    "rows two before": (MIDDLE, "torch.cumsum(mask, 1) * mask - 1.0", "F.pad(mask, (0, 0, 2, -2)).cumsum(1)"),
    "rows before, with ones in front": (EITHER, "torch.cumsum(mask, 1) * mask - 1.0",
                                        "F.pad(mask, (0, 0, 1, -1), value=1.0).cumsum(1) - 1.0"),
    "rows of the expert before": (MIDDLE, "torch.cumsum(mask, 1) * mask - 1.0", "F.pad(mask, (1, -1)).cumsum(1)"),
    "rows after": (EITHER, "torch.cumsum(mask, 1) * mask - 1.0", "mask.flip(1).cumsum(1).flip(1) - 1.0"),
    "the mask that was not cut": (MIDDLE, "kept[..., None] * place", "mask[..., None] * place"),
    "the mask that was not cut, read": (
        MIDDLE,
        "gate[..., None, None] * dispatch",
        "gate[..., None, None] * mask[..., None] * place[..., None, :]",
    ),
    "sequences share places": (
        MIDDLE,
        '"bsec,bsm->ebcm", dispatch, x)',
        '"bsec,asm->ebcm", dispatch, x)',
    ),
    "places of the other sequence": (MIDDLE, '"bsec,ebcm->bsm", combine', '"bsec,ebcm->bsm", combine.flip(0)'),
    "rows of the other sequence": (EITHER, '"bsec,bsm->ebcm", dispatch, x)', '"bsec,bsm->ebcm", dispatch, x.flip(0))'),
    "other weights": (EITHER, "gate[..., None, None] * dispatch", "(x @ router2).sigmoid()[..., :1, None] * dispatch"),
    "weights of the experts": (EITHER, "gate[..., None, None] * dispatch", "(x @ router2)[..., None] * dispatch"),
    "weights at the input": (MIDDLE, "gate[..., None, None] * dispatch", "dispatch",
                             '"bsec,bsm->ebcm", dispatch', '"bsec,bsm->ebcm", gate[..., None, None] * dispatch'),
    "choices of another router": (EITHER, "F.one_hot(ids, E)", "F.one_hot((x @ router2).argmax(-1), E)"),
    "several choices": (MIDDLE, "F.one_hot(ids, E).float()", "((x @ router) > 0).float()", "kept).sum", "kept).amax"),
    "a soft choice": (MIDDLE, "F.one_hot(ids, E).float()", "(x @ router).softmax(-1)"),
    "kept by a place too much": (MIDDLE, "(position < 2)", "(position <= 2)",
                                 "(position * kept).sum(-1).long()", "(position * kept).sum(-1).long().clamp(max=1)"),
    "kept by a bound between two places": (EITHER, "(position < 2)", "(position < 1.5)"),
    "a place rounded down": (MIDDLE, "(position * kept).sum(-1).long()", "(position * kept * 0.5).sum(-1).long()"),
    "counted from a half": (MIDDLE, "mask - 1.0", "mask - 1.5"),
    "counted in halves": (MIDDLE, "torch.cumsum(mask, 1) * mask - 1.0", "torch.cumsum(mask, 1) * mask * 0.5 - 0.5"),
    "weights rounded": (EITHER, "gate[..., None, None] * dispatch", "(gate[..., None, None] * dispatch * 3).long()",
                        '"bsec,ebcm->bsm", combine', '"bsec,ebcm->bsm", combine.float()'),
    "counts of two masks": (MIDDLE, "torch.cumsum(mask, 1) * mask - 1.0", "(torch.cumsum(mask * 0.5, 1) * mask - 0.5)"),
}  # fmt: skip


def counted(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P5: one choice and many tokens."""
    gate, ids = (x @ router).softmax(-1).max(-1)
    mask = F.one_hot(ids, E)
    position = mask.cumsum(0) - 1
    kept = mask * (position < MANY)
    place = (position * kept).sum(1)
    dispatch = kept.float()[..., None] * (place[:, None] == torch.arange(MANY)).float()[:, None]
    rows = torch.einsum("sec,sm->ecm", dispatch, x)
    h = F.silu(torch.einsum("ecm,ehm->ech", rows, w1)) * torch.einsum("ecm,ehm->ech", rows, w3)
    return torch.einsum("sec,ecm->sm", gate[:, None, None] * dispatch, torch.einsum("ech,emh->ecm", h, w2))


NARROW = {
    "bfloat16": ("mask.cumsum(0)", "mask.cumsum(0, dtype=torch.bfloat16).long()"),
    "bfloat16 of a bfloat16 mask": ("mask.cumsum(0)", "mask.bfloat16().cumsum(0).float().long()"),
    "bfloat16 afterwards": ("mask.cumsum(0) - 1", "(mask.cumsum(0) - 1).bfloat16().long()"),
    "int8": ("mask.cumsum(0)", "mask.cumsum(0, dtype=torch.int8)"),
    "int8 afterwards": ("mask.cumsum(0) - 1", "(mask.cumsum(0) - 1).to(torch.int8)"),
    "uint8": ("mask.cumsum(0)", "mask.cumsum(0, dtype=torch.uint8).long()"),
    "sum in int8": ("(position * kept).sum(1)", "(position * kept).sum(1, dtype=torch.int8).long()"),
}
"""Dtypes that cannot count the tokens of an expert."""
