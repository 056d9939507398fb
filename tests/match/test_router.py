"""The router's name in the report."""

import pytest
import torch
from torch import nn

from samoyeds_compile import Report
from tests.blocks import Block


class Routed(Block):
    """A block whose router is given: (logits, token ids) -> (weights, ids)."""

    def __init__(self, route, **kwargs):
        super().__init__(**kwargs)
        self.route = route
        self.table = nn.Parameter(torch.randint(0, 4, (10, 2)), requires_grad=False)

    def forward(self, x, tokens):
        return self.grouped(x, *reversed(self.route(self, self.router(x), tokens)))


def softmax_topk(self, logits, tokens):
    return logits.softmax(-1).topk(2, -1)


def topk_softmax(self, logits, tokens):
    weights, ids = logits.topk(2, -1)
    return weights.softmax(-1), ids


def renormalised(self, logits, tokens):
    weights, ids = logits.softmax(-1).topk(2, -1)
    return weights / weights.sum(-1, keepdim=True), ids


def sigmoid_grouped(self, logits, tokens):
    scores = logits.sigmoid()
    best = scores.view(-1, 2, 2).topk(2, -1)[0].sum(-1).topk(1, -1)[1]
    mask = torch.zeros(scores.shape[0], 2).scatter_(1, best, 1).unsqueeze(-1).expand(-1, 2, 2).reshape(-1, 4)
    ids = scores.masked_fill(~mask.bool(), float("-inf")).topk(2, -1)[1]
    return scores.gather(1, ids), ids


def hashed(self, logits, tokens):
    ids = self.table[tokens]
    return logits.sigmoid().gather(1, ids), ids


def opaque(self, logits, tokens):
    ids = torch.stack([tokens % 4, (tokens + 1) % 4], -1)
    return logits.sigmoid().gather(1, ids), ids


@pytest.mark.parametrize(
    ("route", "name"),
    [
        (softmax_topk, "softmax-topk"),
        (renormalised, "softmax-topk"),
        (topk_softmax, "topk-softmax"),
        (sigmoid_grouped, "sigmoid-grouped"),
        (hashed, "hash"),
        (opaque, "opaque"),
    ],
)
def test_router_name(route, name):
    report = Report()
    model = torch.compile(Routed(route), backend="samoyeds", options={"base": "eager", "report": report})
    model(torch.randn(5, 16), torch.randint(0, 10, (5,)))
    (block,) = report.blocks
    assert (block.rewritten, block.router) == (True, name)
