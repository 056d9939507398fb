"""Which routers are fused and which are left alone. Validation is off: the matcher alone must tell."""

import pytest
import torch
import torch.nn.functional as F

from tests.routers.routed import Routed, assert_same, compiled, specs

INF = float("inf")


def run(route):
    model = Routed(route)
    forward, seen = compiled(model)
    assert_same(model, forward)
    ((gm, report),) = seen
    (block,) = report.blocks
    assert (report.problem, block.rewritten) == (None, True)
    assert block.router_fused == (block.router_reason is None) == (len(specs(gm)) == 1)
    return block, specs(gm)


def mask_of(group_scores, k=2, index=None, value=1):
    best = torch.topk(group_scores, k, dim=-1, sorted=False)[1] if index is None else index
    mask = torch.zeros_like(group_scores).scatter_(1, best, value)
    return mask.unsqueeze(-1).expand(-1, 4, 2).reshape(-1, 8)


def top2(choice):
    return choice.view(-1, 4, 2).topk(2, dim=-1)[0].sum(dim=-1)


def grouped(logits, block, choice_of=lambda s, b: s + b, mask=lambda c: ~mask_of(top2(c)).bool(), fill=-INF, k=3):
    """As deepseek_v3 has it, with parts to exchange."""
    scores = logits.sigmoid()
    choice = choice_of(scores, block.bias)
    choice = choice.masked_fill(mask(choice), fill)
    ids = torch.topk(choice, k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights /= weights.sum(dim=-1, keepdim=True) + 1e-20
    return weights * 2.5, ids


# ------------------------------------------------------------------------------------------------- fused


def in_place_twice(logits, block):
    weights, ids = logits.softmax(-1).topk(2)
    weights.div_(weights.sum(-1, keepdim=True))
    weights *= 2
    return weights, ids


def clamped_in_place(logits, block):
    scores = F.softmax(logits, dim=1, dtype=torch.float)
    ids = (scores + block.bias.unsqueeze(0)).topk(2, dim=1).indices
    weights = scores.gather(-1, ids)
    return weights / weights.sum(1, keepdim=True).clamp(min=0.1), ids


def best_of_group(logits, block):
    scores = torch.softmax(logits, -1)
    best = scores.view(-1, 4, 2).max(dim=-1).values
    weights, ids = scores.masked_fill(~mask_of(best).bool(), 0.0).topk(3, sorted=False)
    return weights * 1.5, ids


def masked_in_place(logits, block):
    scores = logits.sigmoid()
    choice = scores + block.bias
    choice.masked_fill_(~mask_of(top2(choice)).bool(), -INF)
    ids = choice.topk(2)[1]
    return scores.gather(1, ids), ids


FUSED = {
    "softmax, topk": (
        lambda z, b: z.softmax(-1).topk(2, -1),
        {"scoring": "softmax", "order": "score_then_topk", "renormalise": "none", "scale": None, "sorted": True}),
    "functional, unsorted, scaled": (
        lambda z, b: ((r := torch.topk(F.softmax(z, dim=1), 2, sorted=False))[0] * 1.5, r[1]),
        {"sorted": False, "scale": 1.5}),
    "softmax dtype, cast": (
        lambda z, b: ((r := F.softmax(z, dim=-1, dtype=torch.double).topk(2))[0].to(torch.float32), r[1]),
        {"score_dtype": torch.double, "out_dtype": torch.float32}),
    "renormalised": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / r[0].sum(-1, keepdim=True), r[1]),
        {"renormalise": "sum", "epsilon": 0.0}),
    "renormalised, epsilon on the left": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / (1e-3 + r[0].sum(dim=(-1,), keepdim=True)), r[1]),
        {"renormalise": "sum", "epsilon": 1e-3}),
    "in place twice": (in_place_twice, {"renormalise": "sum", "scale": 2.0}),
    "clamped, bias as a row": (clamped_in_place, {"renormalise": "clamped_sum", "epsilon": 0.1}),
    "gathered from the scores chosen from": (
        lambda z, b: ((s := z.softmax(-1)).gather(1, (i := s.topk(2)[1])), i), {"weights_from": "scores"}),
    "one expert": (lambda z, b: z.softmax(-1).topk(1, -1), {"top_k": 1}),
    "all experts": (lambda z, b: z.softmax(-1).topk(8, -1), {"top_k": 8}),
    "topk, softmax": (
        lambda z, b: ((r := z.topk(2))[0].softmax(-1), r[1]), {"scoring": "softmax", "order": "topk_then_score"}),
    "topk, sigmoid": (
        lambda z, b: ((r := z.topk(2))[0].sigmoid(), r[1]), {"scoring": "sigmoid", "order": "topk_then_score"}),
    "topk of biased, gather, sigmoid": (
        lambda z, b: (z.gather(1, (i := (z + b.bias).topk(2)[1])).sigmoid(), i),
        {"order": "topk_then_score", "weights_from": "scores"}),
    "sigmoid, bias": (
        lambda z, b: ((s := z.sigmoid()).gather(1, (i := (b.bias + s).topk(2)[1])), i),
        {"scoring": "sigmoid", "weights_from": "scores", "n_group": 1}),
    "groups": (grouped, {"n_group": 4, "topk_group": 2, "group_score": "top2_sum", "masked_score": -INF, "scale": 2.5}),
    "groups masked in place": (masked_in_place, {"n_group": 4, "topk_group": 2, "masked_score": -INF}),
    "groups without bias": (lambda z, b: grouped(z, b, lambda s, bias: s), {"n_group": 4, "weights_from": "scores"}),
    "masked by zero, more experts than are open": (lambda z, b: grouped(z, b, fill=0.0, k=6), {"masked_score": 0.0}),
    "best of the group, masked weights": (best_of_group, {"group_score": "max", "weights_from": "choice"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    route, expected = FUSED[name]
    _, (spec,) = run(route)
    assert {key: getattr(spec, key) for key in expected} == expected


# ---------------------------------------------------------- fused as far as the op goes; the rest stays as it was


def renormalised_by_others(logits, block):
    weights, ids = logits.softmax(-1).topk(2)
    return weights / (weights + block.bias[ids]).sum(-1, keepdim=True), ids


PARTLY = {
    "temperature": (lambda z, b: (z / 0.7).softmax(-1).topk(2), {}),
    "noise on the logits": (lambda z, b: (z + z.detach().cos()).softmax(-1).topk(2), {}),
    "bias within the sigmoid": (lambda z, b: (z + b.bias).sigmoid().topk(2), {}),
    "scale of each expert": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / r[0].sum(-1, keepdim=True) * b.bias[r[1]], r[1]),
        {"renormalise": "sum", "scale": None}),
    "renormalised by other numbers": (renormalised_by_others, {"renormalise": "none"}),
    "renormalised over the tokens": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / r[0].sum(0, keepdim=True), r[1]), {"renormalise": "none"}),
    "renormalised by the squares": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / r[0].square().sum(-1, keepdim=True), r[1]),
        {"renormalise": "none"}),
    "divided the wrong way round": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0].sum(-1, keepdim=True) / r[0], r[1]), {"renormalise": "none"}),
    "the sum is clamped from above": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / r[0].sum(-1, keepdim=True).clamp(0.1, 0.4), r[1]),
        {"renormalise": "none"}),
    "the sum is returned": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / (s := r[0].sum(-1, keepdim=True)), r[1], s),
        {"renormalise": "none"}),
    "scaled, then renormalised": (
        lambda z, b: ((w := (r := z.softmax(-1).topk(2))[0] * 3) / w.sum(-1, keepdim=True), r[1]),
        {"scale": 3.0, "renormalise": "none"}),
    "both raw and renormalised are read": (
        lambda z, b: ((r := z.softmax(-1).topk(2))[0] / r[0].sum(-1, keepdim=True), r[1], r[0]),
        {"renormalise": "none"}),
    "the logits are returned": (lambda z, b: (*z.softmax(-1).topk(2), z), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTLY)
def test_fused_in_part(name):
    route, expected = PARTLY[name]
    _, (spec,) = run(route)
    assert {key: getattr(spec, key) for key in expected} == expected


# ------------------------------------------------------------------------------------------ look-alikes


def choice_without_gradient(logits, block):
    scores = logits.sigmoid()
    with torch.no_grad():
        ids = (scores + block.bias).topk(2)[1]
    return scores.gather(1, ids), ids


def logits_change_before_the_choice(logits, block):
    weights, ids = (logits := logits * 1).topk(2)
    return weights.softmax(-1), ids, logits.mul_(0.5)


def logits_overwritten(logits, block):
    logits = logits.detach().clone()
    scores = logits.sigmoid()
    logits.mul_(0.5)
    ids = (scores + block.bias).topk(2)[1]
    return scores.gather(1, ids) * block.router.weight.sum(), ids, logits


def copied_scores(logits, block):
    scores = logits.sigmoid()
    choice = scores.clone()
    choice += block.bias
    ids = choice.topk(2)[1]
    return scores.gather(1, ids), ids


def weights_from_another_topk(logits, block):
    scores = logits.softmax(-1)
    return scores.topk(3)[0][:, :2], scores.topk(2)[1]


def weights_of_other_logits(logits, block):
    ids = logits.softmax(-1).topk(2)[1]
    return (logits * 2).softmax(-1).gather(1, ids), ids


def noise_on_the_scores(logits, block):
    scores = logits.softmax(-1)
    ids = (scores + logits.detach().cos()).topk(2)[1]
    return scores.gather(1, ids), ids


def group_mask_from_unbiased(logits, block):
    scores = logits.sigmoid()
    return grouped(logits, block, mask=lambda c: ~mask_of(top2(scores)).bool())


def half_of_each_group(choice):
    scores = top2(choice)
    mask = torch.zeros_like(scores).scatter_(1, scores.topk(2)[1], 1)
    return ~(mask.unsqueeze(-1) * torch.arange(2)).reshape(-1, 8).bool()


def best_alone(choice):
    return choice.view(-1, 4, 2).topk(1, dim=-1)[0].sum(dim=-1)


LOOKALIKES = {
    "softmax over the tokens": (lambda z, b: z.softmax(0).topk(2), "not over the experts"),
    "log-softmax": (lambda z, b: z.log_softmax(-1).topk(2), "neither before nor after"),
    "softplus": (lambda z, b: F.softplus(z).topk(2), "neither before nor after"),
    "no scores at all": (lambda z, b: z.topk(2), "neither before nor after"),
    "the smallest": (lambda z, b: z.softmax(-1).topk(2, largest=False), "takes the smallest"),
    "sort instead of topk": (
        lambda z, b: ((r := z.softmax(-1).sort(descending=True))[0][:, :2], r[1][:, :2]), "not the indices of a top-k"),
    "scores are returned": (lambda z, b: (*(s := z.softmax(-1)).topk(2), s), "read outside"),
    "scores enter a loss": (lambda z, b: (*(s := z.sigmoid()).topk(2), s.mean(0)), "read outside"),
    "divided by the sum of all scores": (
        lambda z, b: ((r := (s := z.sigmoid()).topk(2))[0] / s.sum(-1, keepdim=True), r[1]), "read outside"),
    "weights of another top-k": (weights_from_another_topk, "neither the top-k's values nor gathered"),
    "weights of other logits": (weights_of_other_logits, "other scores than those chosen from"),
    "weights gathered with the bias": (
        lambda z, b: ((c := z.sigmoid() + b.bias).gather(1, (i := c.topk(2)[1])), i), "neither before nor after"),
    "weights chosen with the bias": (lambda z, b: (z.sigmoid() + b.bias).topk(2), "neither before nor after"),
    "noise on the scores": (noise_on_the_scores, "no bias for each expert"),
    "bias from the scores": (
        lambda z, b: ((s := z.sigmoid()).gather(1, (i := (s + s.mean(0)).topk(2)[1])), i), "read outside"),
    "bias taken twice": (
        lambda z, b: ((s := z.sigmoid()).gather(1, (i := torch.add(s, b.bias, alpha=2).topk(2)[1])), i),
        "other scores than those chosen from"),
    "bias multiplied": (
        lambda z, b: ((s := z.sigmoid()).gather(1, (i := (s * b.bias).topk(2)[1])), i),
        "other scores than those chosen from"),
    "choice without gradient": (choice_without_gradient, "grad mode or autocast changes"),
    "logits overwritten in between": (logits_overwritten, "overwritten before"),
    "ids changed": (lambda z, b: ((r := z.softmax(-1).topk(2))[0], r[1].clamp(max=5)), "not the indices of a top-k"),
    "scores cloned": (copied_scores, "other scores than those chosen from"),
    "groups: mask not inverted": (
        lambda z, b: grouped(z, b, mask=lambda c: mask_of(top2(c)).bool()), "not built from the indices"),
    "groups: mask of zeros": (
        lambda z, b: grouped(z, b, mask=lambda c: ~mask_of(top2(c), value=0).bool(), fill=0.0),
        "not built from the indices"),
    "groups: scored without the bias": (group_mask_from_unbiased, "other scores than those masked"),
    "groups: scored by the mean": (
        lambda z, b: grouped(z, b, mask=lambda c: ~mask_of(c.view(-1, 4, 2).mean(-1)).bool()), "scored by neither"),
    "groups: scored by the sum of one": (
        lambda z, b: grouped(z, b, mask=lambda c: ~mask_of(best_alone(c)).bool()), "scored by neither"),
    "groups: chosen by other scores": (
        lambda z, b: grouped(z, b, mask=lambda c: ~mask_of(top2(c), index=top2(-c).topk(2)[1]).bool()),
        "not built from the indices"),
    "groups: interleaved": (
        lambda z, b: grouped(z, b, mask=lambda c: ~mask_of(top2(c)).view(-1, 4, 2).mT.reshape(-1, 8).bool()),
        "not built from the indices"),
    "groups: only half of each": (
        lambda z, b: grouped(z, b, mask=half_of_each_group), "not built from the indices"),
    "groups: filled from a tensor": (
        lambda z, b: grouped(z, b, fill=b.bias.min()), "other than a number"),
    "a mask of another kind": (lambda z, b: grouped(z, b, mask=lambda c: z < 0), "not built from the indices"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalike(name):
    route, reason = LOOKALIKES[name]
    block, found = run(route)
    assert found == []
    assert reason in block.router_reason


def test_logits_overwritten_after_the_choice():
    """What happens to the logits later is no concern of the router."""
    _, (spec,) = run(logits_change_before_the_choice)
    assert spec.order == "topk_then_score"


class Overwriting(Routed):
    """Writes to what the router returned when the experts have read it."""

    def __init__(self, which):
        super().__init__(lambda z, block: z.softmax(-1).topk(2))
        self.which = which

    def forward(self, x):
        weights, ids = self.route(self.router(x), self)
        out = self.grouped(x, ids, weights)
        (weights if self.which == "weights" else ids).clamp_(max=0)
        return out, weights, ids


@pytest.mark.parametrize("which", ["weights", "ids"])
def test_results_overwritten_later(which):
    model = Overwriting(which)
    forward, seen = compiled(model)
    x = torch.randn(5, 16)
    with torch.no_grad():
        for mine, theirs in zip(forward(x), model(x), strict=True):
            torch.testing.assert_close(mine, theirs)
    assert "overwritten later" in seen[0][1].blocks[0].router_reason


class Shared(Routed):
    """Two sets of experts behind one router, each with weights of its own."""

    def forward(self, x):
        weights, ids = self.route(self.router(x), self)
        return self.grouped(x, ids, weights) + self.grouped(x, ids, weights * 2), weights, ids


def test_shared_router():
    model = Shared(lambda z, block: z.softmax(-1).topk(2))
    forward, seen = compiled(model)
    assert_same(model, forward)
    ((gm, report),) = seen
    assert [b.router_fused for b in report.blocks] == [True, True]
    assert len(specs(gm)) == 1
