"""A block whose router is given, and what the pipeline makes of it."""

import torch
from torch import nn

from samoyeds_compile import Options
from samoyeds_compile.backend import optimize
from samoyeds_compile.routers.region import Spec
from tests.blocks import Block

EXPERTS = 8


class Routed(Block):
    """``route(logits, block) -> (weights, ids[, more])``; returns the block's output and what the router returned."""

    def __init__(self, route, **kwargs):
        super().__init__(experts=EXPERTS, **kwargs)
        self.route = route
        self.bias = nn.Parameter(torch.linspace(-0.2, 0.2, EXPERTS).roll(3), requires_grad=False)
        self.top_k = route(self.router(torch.randn(3, self.router.in_features)), self)[1].shape[1]

    def forward(self, x):
        weights, ids, *more = self.route(self.router(x), self)
        return self.grouped(x, ids, weights), weights, ids, *more


def compiled(model, validate=False, dynamic=None):
    """The compiled model, and a list of (graph after the pipeline, report) that its calls fill."""
    seen = []

    def backend(gm, example_inputs):
        seen.append((gm, optimize(gm, example_inputs, Options(fuse_routers=True, validate=validate))))
        return gm.forward

    return torch.compile(model, backend=backend, dynamic=dynamic), seen


def specs(gm):
    """The attributes of each router op in the graph."""
    found = gm.graph.find_nodes(op="call_function", target=torch.ops.samoyeds.router.default)
    return [Spec(*node.args[2:]) for node in found]


def assert_same(model, forward, tokens=11):
    """What the router returned is equal bit for bit, the rest up to rounding; some tokens are the same, so they tie."""
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens))
    x[1::2] = x[0]
    leaves = [p for p in model.parameters() if p.requires_grad]
    results = []
    for function in (model, forward):
        outputs = function(x)
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs if o.requires_grad)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for position, (mine, theirs) in enumerate(zip(*results, strict=True)):
        exact = 0 < position < len(outputs)
        torch.testing.assert_close(theirs, mine, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-5)
