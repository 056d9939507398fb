"""Weights looked up with `F.embedding`, the worked example of docs/add-a-pattern.md, and what is one edit away."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samoyeds_compile import Report

H, WIDTH, E, K = 16, 24, 4, 2


class Embedded(nn.Module):
    """Flat rows of the stacks are looked up like words."""

    def __init__(self, first=None, second=None, up=None):
        super().__init__()
        self.router = nn.Linear(H, E)
        self.up = nn.Parameter(up if up is not None else 0.1 * torch.randn(E, WIDTH, H))
        self.down = nn.Parameter(0.1 * torch.randn(E, H, WIDTH))
        self.first, self.second = first or {}, second or {}

    def chosen(self, x):
        weights, ids = self.router(x).softmax(-1).topk(K)
        return weights, ids, ids

    def forward(self, x):
        weights, ids, others = self.chosen(x)
        up = F.embedding(ids, self.up.flatten(1), **self.first).view(*ids.shape, WIDTH, H)
        down = F.embedding(others, self.down.flatten(1), **self.second).view(*ids.shape, H, WIDTH)
        h = F.silu(torch.einsum("th,tkih->tki", x, up))
        return (torch.einsum("tki,tkhi->tkh", h, down) * weights.unsqueeze(-1)).sum(1)


class Products(Embedded):
    """The same with one batched product a slot."""

    def forward(self, x):
        weights, ids, _ = self.chosen(x)
        rows = x.repeat_interleave(K, 0).unsqueeze(-1)
        up = F.embedding(ids.flatten(), self.up.flatten(1)).view(-1, WIDTH, H)
        down = F.embedding(ids.flatten(), self.down.flatten(1)).view(-1, H, WIDTH)
        y = torch.bmm(down, F.silu(torch.bmm(up, rows))).squeeze(-1) * weights.flatten().unsqueeze(-1)
        return y.view(*ids.shape, H).sum(1)


class OtherIds(Embedded):
    """The second projection is another expert's."""

    def chosen(self, x):
        weights, ids, _ = super().chosen(x)
        return weights, ids, ids.flip(-1)


def run(module, forward, x):
    x = x.clone().requires_grad_()
    out = forward(x)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def compare(module, **options):
    """The report, after outputs and gradients were found to be those of eager mode."""
    report, original, x = Report(), copy.deepcopy(module), torch.randn(14, H)
    forward = torch.compile(module, backend="samoyeds", options={"base": "aot_eager", "report": report, **options})
    found, expected = run(module, forward, x), run(original, original, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    return report


@pytest.mark.parametrize("kind", [Embedded, Products])
def test_rewritten(kind):
    assert [(b.rewritten, b.reason) for b in compare(kind()).blocks] == [(True, None)]


@pytest.mark.parametrize("side", ["first", "second"])
@pytest.mark.parametrize("option", [{"padding_idx": 1}, {"scale_grad_by_freq": True}], ids=lambda o: next(iter(o)))
def test_options_that_change_gradients(side, option):
    """Expert 1 would get no gradient, or a smaller one; the matcher says so, without validation."""
    assert compare(Embedded(**{side: option}), validate=False).rewritten == []


def test_other_ids():
    assert compare(OtherIds(), validate=False).rewritten == []
