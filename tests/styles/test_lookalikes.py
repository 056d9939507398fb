"""One edit away from a real block of the hand-written styles: none may be rewritten into something else.

Validation is off: the matcher alone must tell them apart. Each base is a real block, written out once; an edit is a
piece of its source and what stands there instead. After a ``KEPT`` edit no expert op computes the same, so nothing may
be rewritten. After an ``EITHER`` edit there still is one (for other operands), and only the result counts. After a
``MIDDLE`` edit the products of [E, C, H] are as good as ever, but not what is around them.
"""

import inspect
import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.blocks import grouped_mm
from tests.styles.harness import Seen, compare
from tests.styles.zoo import capture_settings

E, K, T, H, D, C = 4, 2, 14, 8, 12, 3
MANY = 500
KEPT, EITHER, MIDDLE = "kept", "either", "middle"
Function = Callable[..., Any]
_USED = (F, grouped_mm)  # by the source of the blocks


class Block(nn.Module):
    """A block that is a function of tokens, two routers, the experts' weights and their biases."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        shapes = [(H, E), (H, E), (E, D, H), (E, D, H), (E, H, D), (E, D), (E, H)]
        self.operands = nn.ParameterList(torch.randn(shape) * 0.5 for shape in shapes)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.operands)


def loop(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P3: one-hot mask, ``where``, ``index_add_``."""
    weights, ids = (x @ router).softmax(-1).topk(K)
    mask = F.one_hot(ids, E).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for e in range(E):
        slot, token = torch.where(mask[e])
        rows = x[token]
        h = F.silu(F.linear(rows, w1[e], b1[e])) * F.linear(rows, w3[e])
        y = F.linear(h, w2[e], b2[e])
        y = y * weights[token, slot, None]
        out.index_add_(0, token, y)
    return out


LOOP = {
    "an expert skipped": (KEPT, "range(E)", "range(E - 1)"),
    "the first expert skipped": (KEPT, "range(E)", "range(1, E)"),
    "an expert twice": (KEPT, "range(E)", "(0, 0, 1, 2, 3)"),
    "another order": (EITHER, "range(E)", "(3, 1, 0, 2)"),
    "a weight used twice": (EITHER, "w3[e]", "w1[e]"),
    "one weight for all": (EITHER, "w3[e]", "w3[0]"),
    "the weights of the next for one": (EITHER, "w2[e]", "w2[2 if e == 1 else e]"),
    "the mask of the next": (EITHER, "mask[e]", "mask[(e + 1) % E]"),
    "the mask of the next for one": (KEPT, "mask[e]", "mask[2 if e == 1 else e]"),
    "another activation for one": (KEPT, "F.silu(", "(F.gelu if e == 1 else F.silu)("),
    "a normalisation dropped for one": (
        KEPT,
        "y = F.linear(h",
        "h = F.rms_norm(h, (D,)) if e else h\n        y = F.linear(h",
    ),
    "no bias for one": (KEPT, "b2[e]", "b2[e] if e != 1 else None"),
    "another bias for one": (EITHER, "b2[e]", "b2[2 if e == 1 else e]"),
    "a scale for one": (KEPT, "y = y * weights", "y = (y * 2 if e == 1 else y) * weights"),
    "reads h": (EITHER, "return out", "return out, h.sum()"),
    "reads the rows": (EITHER, "return out", "return out, rows.sum(), h.amax()"),
    "rows by slot": (KEPT, "x[token]", "x[slot]"),
    "to other tokens": (KEPT, "index_add_(0, token", "index_add_(0, T - 1 - token"),
    "from other tokens": (EITHER, "x[token]", "x[T - 1 - token]"),
    "writes instead of adds": (KEPT, "out.index_add_(0, token, y)", "out[token] = y"),
    "subtracts": (EITHER, "out.index_add_(0, token, y)", "out[token] -= y"),
    "weights of the other slot": (EITHER, "weights[token, slot", "weights[token, 1 - slot"),
    "weights of one slot": (EITHER, "weights[token, slot", "weights[token, 0 * slot"),
    "weights twice": (EITHER, "weights[token, slot, None]", "weights[token, slot, None] * weights[token, slot, None]"),
    "no weights": (EITHER, "y = y * weights[token, slot, None]", "pass"),
    "before and after": (EITHER, "rows = x[token]", "rows = x[token] * weights[token, slot, None]"),
    "mask of other ids": (EITHER, "mask = F.one_hot(ids", "ids = (x @ router2).topk(K).indices; mask = F.one_hot(ids"),
    "mask of ids or others": (
        KEPT,
        "where(mask[e])",
        "where(mask[e] + F.one_hot((x @ router2).topk(K).indices, E).permute(2, 1, 0)[e])",
    ),
    "mask inverted": (KEPT, "where(mask[e])", "where(mask[e] == 0)"),
    "below instead of equal": (KEPT, "where(mask[e])", "where((ids <= e).t())"),
    "only the first choice": (KEPT, "where(mask[e])", "where(mask[e, :1])"),
    "onto ones": (EITHER, "torch.zeros_like(x)", "torch.ones_like(x)"),
    "result read in between": (KEPT, "rows = x[token]", "rows = x[token] + out[token]"),
    "rows with their mean": (KEPT, "rows = x[token]", "rows = x[token] - x[token].mean(0)"),
    "ids that repeat": (EITHER, "mask = F.one_hot(ids", "ids = ids % 2; mask = F.one_hot(ids"),
    "ids that repeat, added at once": (
        KEPT,
        "mask = F.one_hot(ids",
        "ids = ids % 2; mask = F.one_hot(ids",
        "out.index_add_(0, token, y)",
        "out[token] += y",
    ),
}


def split(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P3: sorted rows, split, concatenated, unsorted, summed over k."""
    weights, ids = (x @ router).softmax(-1).topk(K)
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    sizes = F.one_hot(flat, E).sum(0).tolist()
    parts = x[order // K].split(sizes)
    results = [F.linear(F.silu(F.linear(part, w1[e])) * F.linear(part, w3[e]), w2[e]) for e, part in enumerate(parts)]
    y = torch.cat(results)
    back = torch.empty_like(y)
    back[order] = y
    return (back.view(T, K, H) * weights.unsqueeze(-1)).sum(1)


SPLIT = {
    "unsorted": (KEPT, "flat.argsort(stable=True)", "torch.arange(T * K)"),
    "sorted by other ids": (
        KEPT,
        "flat.argsort(stable=True)",
        "(x @ router2).topk(K).indices.flatten().argsort(stable=True)",
    ),
    "sorted downwards": (KEPT, "stable=True", "stable=True, descending=True"),
    "sizes of other ids": (KEPT, "F.one_hot(flat, E)", "F.one_hot((x @ router2).topk(K).indices.flatten(), E)"),
    "sizes shifted by one": (KEPT, "sum(0).tolist()", "sum(0).roll(1).tolist()"),
    "concatenated backwards": (KEPT, "torch.cat(results)", "torch.cat(results[::-1])"),
    "an expert passed over": (
        KEPT,
        "for e, part in enumerate(parts)]",
        "if e else part for e, part in enumerate(parts)]",
    ),
    "rows by remainder": (KEPT, "order // K", "order % T"),
    "not unsorted": (KEPT, "back[order] = y", "back[:] = y"),
    "sorted once more": (KEPT, "back[order] = y", "back[:] = y[order]"),
    "largest over k": (KEPT, ".sum(1)", ".amax(1)"),
    "mean over k": (EITHER, ".sum(1)", ".mean(1)"),
    "viewed as [K, T, H]": (
        KEPT,
        "(back.view(T, K, H) * weights.unsqueeze(-1)).sum(1)",
        "(back.view(K, T, H) * weights.t().unsqueeze(-1)).sum(0)",
    ),
}


def grouped(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P1: torchtitan's block with scores before the experts."""
    weights, ids = (x @ router).sigmoid().topk(K)
    counts = torch.histc(ids.view(-1).float(), bins=E, min=0, max=E)
    order = torch.argsort(ids.view(-1), stable=True)
    tokens = (order // K).reshape(-1, 1).expand(-1, H)
    rows = torch.gather(x, 0, tokens)
    rows = rows * weights.view(-1)[order].reshape(-1, 1)
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    h = F.silu(grouped_mm(rows, w1.mT, offsets)) * grouped_mm(rows, w3.mT, offsets)
    y = grouped_mm(h, w2.mT, offsets)
    return torch.zeros_like(x).scatter_add(0, tokens, y)


GROUPED = {
    "offsets shifted by one": (KEPT, "torch.cumsum(counts,", "torch.cumsum(counts.roll(1),"),
    "offsets of other ids": (KEPT, "histc(ids.view(-1)", "histc((x @ router2).topk(K).indices.view(-1)"),
    "bins too wide": (KEPT, "max=E)", "max=E + 4)"),
    "bins too narrow": (KEPT, "max=E)", "max=E - 2)"),
    "one product with other offsets": (
        KEPT,
        "w3.mT, offsets",
        "w3.mT, torch.cumsum(counts.roll(1), 0, dtype=torch.int32)",
    ),
    "unsorted": (KEPT, "torch.argsort(ids.view(-1), stable=True)", "torch.arange(T * K)"),
    "sorted downwards": (KEPT, "stable=True", "stable=True, descending=True"),
    "before and after": (
        EITHER,
        "scatter_add(0, tokens, y)",
        "scatter_add(0, tokens, y * weights.view(-1)[order].reshape(-1, 1))",
    ),
    "one product unscaled": (KEPT, "grouped_mm(rows, w3", "grouped_mm(torch.gather(x, 0, tokens), w3"),
    "weights not sorted": (KEPT, "weights.view(-1)[order]", "weights.view(-1)"),
    "to other tokens": (KEPT, "scatter_add(0, tokens", "scatter_add(0, T - 1 - tokens"),
    "added along features": (KEPT, "scatter_add(0, tokens, y)", "scatter_add(1, tokens[:T] % H, y[:T])"),
    "written instead of added": (KEPT, "scatter_add(0, tokens, y)", "scatter(0, tokens, y)"),
    "reads h": (EITHER, "scatter_add(0, tokens, y)", "scatter_add(0, tokens, y), h"),
}


def gathered(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P2: gathered weights and einsums, with biases."""
    values, ids = (x @ router).topk(K)
    weights = values.softmax(-1)
    gate = torch.einsum("ti,taoi->tao", x, w1[ids]) + b1[ids]
    h = F.silu(gate) * torch.einsum("ti,taoi->tao", x, w3[ids])
    y = torch.einsum("tao,taio->tai", h, w2[ids]) + b2[ids]
    return torch.einsum("tai,ta->ti", y, weights)


GATHERED = {
    "one weight by other ids": (KEPT, "w3[ids]", "w3[(x @ router2).topk(K).indices]"),
    "down by other ids": (KEPT, "w2[ids]", "w2[(x @ router2).topk(K).indices]"),
    "down by the other slot": (KEPT, "w2[ids]", "w2[ids.flip(1)]"),
    "a bias by other ids": (KEPT, "b2[ids]", "b2[ids.flip(1)]"),
    "all weights by other ids": (EITHER, "weights = values", "ids = (x @ router2).topk(K).indices; weights = values"),
    "a mean instead of a product": (KEPT, '"tao,taio->tai", h, w2[ids]', '"tao,tbio->tai", h, w2[ids]'),
    "largest over k": (KEPT, 'torch.einsum("tai,ta->ti", y, weights)', "(y * weights.unsqueeze(-1)).amax(1)"),
    "weights on features": (
        EITHER,
        'torch.einsum("tai,ta->ti", y, weights)',
        "y.sum(1) * weights.sum(1, keepdim=True)",
    ),
    "summed over tokens": (KEPT, '"tai,ta->ti", y', '"tai,ta->ai", y'),
    "weights of other tokens": (EITHER, "y, weights)", "y, weights.flip(0))"),
    "rows mixed": (EITHER, '"ti,taoi->tao", x, w3', '"ti,taoi->tao", x.flip(0), w3'),
}


def dense(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P4: all experts, weights from a softmax of scattered logits."""
    logits = x @ router
    values, ids = logits.topk(K)
    scores = torch.full_like(logits, float("-inf")).scatter(1, ids, values)
    scores = scores.softmax(-1)
    h = F.silu(torch.einsum("th,eih->tei", x, w1) + b1) * torch.einsum("th,eih->tei", x, w3)
    y = torch.einsum("tei,ehi->teh", h, w2) + b2
    return torch.einsum("teh,te->th", y, scores)


DENSE = {
    "a soft mixture": (KEPT, "scores = scores.softmax(-1)", "scores = logits.softmax(-1)"),
    "zero instead of minus infinity": (KEPT, 'float("-inf")', "0.0"),
    "weights not zero for the others": (
        KEPT,
        "scores = scores.softmax(-1)",
        "scores = torch.full_like(logits, 0.1).scatter(1, ids, values)",
    ),
    "a little for everyone": (KEPT, "scores = scores.softmax(-1)", "scores = scores.softmax(-1) + 1e-2"),
    "softmax over tokens": (KEPT, "softmax(-1)", "nan_to_num(neginf=-9.0).softmax(0)"),
    "scattered along tokens": (KEPT, "scores.softmax(-1)", "torch.zeros(T, E).scatter(0, ids, values)"),
    "mask not inverted": (
        KEPT,
        "scores.softmax(-1)",
        "logits.sigmoid().masked_fill(torch.zeros(T, E, dtype=torch.bool).scatter(1, ids, True), 0.0)",
    ),
    "scattered twice": (
        KEPT,
        "scores.softmax(-1)",
        "torch.zeros(T, E).scatter(1, ids, values).scatter(1, (x @ router2).topk(K).indices, values)",
    ),
    "softmax twice": (KEPT, "scores.softmax(-1)", "scores.softmax(-1).softmax(-1)"),
    "largest over experts": (KEPT, 'torch.einsum("teh,te->th", y, scores)', "(y * scores.unsqueeze(-1)).amax(1)"),
    "scores squared": (EITHER, '"teh,te->th", y, scores', '"teh,te->th", y, scores * scores'),
    "scores of other tokens": (EITHER, "y, scores)", "y, scores.flip(0))"),
    "scores of other experts": (EITHER, "y, scores)", "y, scores.roll(1, 1))"),
    "down of other experts": (EITHER, "h, w2)", "h, w2.roll(1, 0))"),
    "experts mixed": (KEPT, '"tei,ehi->teh", h, w2', '"tei,fhi->teh", h, w2'),
    "all but the last expert": (
        EITHER,
        "scores = scores.softmax(-1)",
        "scores, w1, w3, w2, b2 = scores.softmax(-1)[:, :3], w1[:3], w3[:3], w2[:3], b2[:3]",
        " + b1",
        "",
    ),
    "all but the last expert, without biases": (
        EITHER,
        "scores = scores.softmax(-1)",
        "scores, w1, w3, w2 = scores.softmax(-1)[:, :3], w1[:3], w3[:3], w2[:3]",
        " + b1",
        "",
        " + b2",
        "",
    ),
    "reads y": (EITHER, '"teh,te->th", y, scores)', '"teh,te->th", y, scores), y.sum(1)'),
}


def before(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P4: Llama 4, scores before the experts."""
    logits = x @ router
    values, ids = logits.topk(K)
    scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, values).sigmoid()
    rows = x.repeat(E, 1) * scores.transpose(0, 1).reshape(-1, 1)
    rows = rows.view(E, -1, H)
    h = F.silu(torch.bmm(rows, w1.mT)) * torch.bmm(rows, w3.mT)
    return torch.bmm(h, w2.mT).sum(0)


BEFORE = {
    "a biased expert": (MIDDLE, "torch.bmm(h, w2.mT)", "torch.baddbmm(b2.unsqueeze(1), h, w2.mT)"),
    "an inner bias": (
        MIDDLE,
        "torch.bmm(rows, w1.mT)) * torch.bmm(rows, w3.mT)",
        "torch.bmm(rows, w1.mT) + b1[:, None]) * (torch.bmm(rows, w3.mT) + 1)",
    ),
    "an activation of zero that is not zero": (
        MIDDLE,
        "F.silu(torch.bmm(rows, w1.mT)) * torch.bmm(rows, w3.mT)",
        "F.silu(torch.bmm(rows, w1.mT)).cos()",
    ),
    "zero instead of minus infinity": (MIDDLE, 'float("-inf")', "0.0"),
    "one product unscaled": (MIDDLE, "torch.bmm(rows, w3.mT)", "torch.bmm(x.repeat(E, 1).view(E, -1, H), w3.mT)"),
    "scores not transposed": (MIDDLE, "scores.transpose(0, 1)", "scores"),
    "tokens repeated one by one": (MIDDLE, "x.repeat(E, 1)", "x.repeat_interleave(E, 0)"),
    "largest over experts": (MIDDLE, ".sum(0)", ".amax(0)"),
}


def places(
    x: Tensor, router: Tensor, router2: Tensor, w1: Tensor, w3: Tensor, w2: Tensor, b1: Tensor, b2: Tensor
) -> Any:  # fmt: skip
    """P5: a padded buffer with dropped tokens."""
    weights, ids = (x @ router).softmax(-1).topk(K)
    capacity, flat = 5, ids.reshape(-1)
    position = (F.one_hot(flat, E).cumsum(0) - 1).gather(1, flat.unsqueeze(1)).squeeze(1)
    slot = torch.where(position < capacity, flat * capacity + position, E * capacity)
    buffer = x.new_zeros(E * capacity + 1, H)
    buffer[slot] = x.repeat_interleave(K, 0)
    rows = buffer[:-1].view(E, capacity, H)
    y = torch.bmm(F.silu(torch.bmm(rows, w1.mT)) * torch.bmm(rows, w3.mT), w2.mT)
    y = torch.cat([y.view(-1, H), x.new_zeros(1, H)])
    return (y[slot].view(T, K, H) * weights.unsqueeze(-1)).sum(1)


PLACES = {
    "positions not unique": (
        MIDDLE,
        "position = (F.one_hot(flat, E).cumsum(0) - 1).gather(1, flat.unsqueeze(1)).squeeze(1)",
        "position = torch.arange(T * K) % capacity",
    ),
    "positions of other ids": (
        MIDDLE,
        "F.one_hot(flat, E).cumsum",
        "F.one_hot((x @ router2).topk(K).indices.flatten(), E).cumsum",
    ),
    "places of the next expert": (MIDDLE, "flat * capacity + position", "(flat + 1) % E * capacity + position"),
    "strides too short": (MIDDLE, "flat * capacity + position", "flat * (capacity - 1) + position"),
    "read from other places": (MIDDLE, "y[slot]", "y[slot.flip(0)]"),
    "dropped ones get the last row": (MIDDLE, "x.new_zeros(1, H)])", "x[:1]])"),
    "tokens as a whole": (MIDDLE, "x.repeat_interleave(K, 0)", "x.repeat(K, 1)"),
    "no token dropped": (MIDDLE, "capacity, flat = 5,", "capacity, flat = T,"),
    "products of other experts": (MIDDLE, "torch.bmm(rows, w3.mT)", "torch.bmm(rows, w3.flip(0).mT)"),
    "products of other rows": (KEPT, "torch.bmm(rows, w3.mT)", "torch.bmm(rows.flip(0), w3.mT)"),
    "mean of the places": (KEPT, "w1.mT)) * torch", "w1.mT)).mean(1, keepdim=True) * torch"),
}


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

BASES: dict[Function, dict[str, tuple[str, ...]]] = {
    loop: LOOP,
    split: SPLIT,
    grouped: GROUPED,
    gathered: GATHERED,
    dense: DENSE,
    before: BEFORE,
    places: PLACES,
    gshard: GSHARD,
    switch: SWITCH,
}


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


def edited(function: Function, *pieces: str) -> Function:
    """The function with pieces of its source replaced: old, new, and so on."""
    source, name = inspect.getsource(function), f"<{function.__name__}: {pieces[1]}>"
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {function.__name__}"
        source = source.replace(old, new)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {}
    exec(compile(source, name, "exec"), dict(globals()), namespace)
    return namespace[function.__name__]  # type: ignore[no-any-return]


def compiled(function: Function, tokens: int = T) -> Seen:
    """Compiled without validation, and equal to eager in outputs and gradients."""
    with capture_settings():
        return compare(Block(function), torch.randn(tokens, H), base="eager", validate=False)


@pytest.mark.parametrize("function", BASES, ids=lambda function: function.__name__)
def test_real_block(function: Function) -> None:
    """What the edits start from is rewritten; otherwise they would prove nothing."""
    seen = compiled(function)
    assert len(seen.report.rewritten) == 1


@pytest.mark.parametrize(
    ("function", "edit"),
    [pytest.param(f, edit, id=f"{f.__name__}, {edit}") for f, edits in BASES.items() for edit in edits],
)
def test_one_edit_away(function: Function, edit: str) -> None:
    expectation, *pieces = BASES[function][edit]
    seen = compiled(edited(function, *pieces))
    assert len(seen.before) == 1
    became = {op.replace(".", "::") for block in seen.report.rewritten for op in block.became}
    if expectation == KEPT:
        assert became == set()
    elif expectation == MIDDLE:
        assert became <= {"samoyeds::experts_batched"}
    assert all(block.rewritten or block.reason for block in seen.report.blocks)


@pytest.mark.parametrize(
    ("function", "edit"),
    [
        pytest.param(f, edit, id=f"{f.__name__}, {edit}")
        for f, edits in BASES.items()
        for edit, (expectation, *_) in edits.items()
        if expectation != EITHER
    ],
)
def test_edit_changes_the_result(function: Function, edit: str) -> None:
    """An edit after which the block may not match computes something else; it is no other spelling of it."""
    torch.manual_seed(1)
    block, x = Block(function), torch.randn(T, H)
    original = block(x)
    block.function = edited(function, *BASES[function][edit][1:])
    result = block(x)
    changed = result[0] if isinstance(result, tuple) else result
    assert changed.shape != original.shape or not torch.allclose(changed, original, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, *NARROW])
def test_counts_in_narrow_dtypes(dtype: str | None) -> None:
    """Counts that wrap around or are rounded put several rows into one place, or none."""
    function = counted if dtype is None else edited(counted, *NARROW[dtype])
    seen = compiled(function, 2 * MANY)
    became = {op.replace(".", "::") for block in seen.report.rewritten for op in block.became}
    assert became == {"samoyeds::moe_experts" if dtype is None else "samoyeds::experts_batched"}


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_dtype_changes_the_result(dtype: str) -> None:
    block, x = Block(counted), torch.randn(2 * MANY, H)
    original = block(x)
    block.function = edited(counted, *NARROW[dtype])
    assert not torch.allclose(block(x), original, rtol=1e-3, atol=1e-4)
