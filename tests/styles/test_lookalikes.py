"""One edit away from a real block of the hand-written styles: none may be rewritten into something else.

Validation is off: the matcher alone must tell them apart. Each base is a real block, written out once; an edit is a
piece of its source and what stands there instead. After a ``KEPT`` edit no expert op computes the same, so nothing may
be rewritten. After an ``EITHER`` edit there still is one (for other operands), and only the result counts. After a
``MIDDLE`` edit the products of [E, C, H] are as good as ever, but not what is around them.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.blocks import grouped_mm
from tests.styles.edits import EITHER, KEPT, MIDDLE, D, E, Function, H, K, T, edited
from tests.styles.harness import Seen, compare
from tests.styles.lookalikes_onehot import GSHARD, MANY, NARROW, SWITCH, counted, gshard, switch
from tests.styles.zoo import capture_settings

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
