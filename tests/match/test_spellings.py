"""Other spellings of the same block: they match as well, and compute the same."""

import pytest
import torch
import torch.nn.functional as F

from samoyeds_compile import Report
from samoyeds_compile.backend import find_blocks
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.match.driver import FAMILIES
from samoyeds_compile.report.model import GraphReport
from tests.blocks import Block, grouped_mm, swiglu


class Spelled(Block):
    """The grouped block with every step open to another spelling."""

    def __init__(self, flatten=None, inverse=None, column=None, token=None, total=None, **kwargs):
        super().__init__(**kwargs)
        self.flatten = flatten or (lambda t: t.reshape(-1))
        self.inverse = inverse or scattered
        self.column = column or (lambda rows, w: rows * w.unsqueeze(-1))
        self.token = token or (lambda perm, k: perm // k)
        self.total = total or (lambda y: y.sum(dim=1))

    def grouped(self, x, ids, weights):
        ids_s, perm = self.flatten(ids).sort()
        counts = ids_s.float().histc(self.experts, 0, self.experts - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        rows = torch.ops.aten.index.Tensor(x, [self.token(perm, self.top_k)])
        y = grouped_mm(self.activate(grouped_mm(rows, self.gate_up.mT, offsets)), self.down.transpose(1, 2), offsets)
        weighted = self.column(y, self.flatten(weights)[perm])
        return self.total(weighted[self.inverse(perm)].reshape(-1, self.top_k, x.shape[-1]))


def scattered(perm):
    inverse = torch.zeros_like(perm)
    inverse[perm] = torch.arange(len(perm))
    return inverse


SPELLINGS = {
    "plain": {},
    "flatten": {"flatten": torch.flatten},
    "view": {"flatten": lambda t: t.view(-1)},
    "argsort": {"inverse": lambda perm: perm.argsort()},
    "floor_divide": {"token": torch.floor_divide},
    "div_floor": {"token": lambda perm, k: torch.div(perm, k, rounding_mode="floor")},
    "column_first": {"column": lambda rows, w: w.unsqueeze(1) * rows},
    "torch_mul": {"column": lambda rows, w: torch.mul(rows, torch.unsqueeze(w, -1))},
    "torch_sum": {"total": lambda y: torch.sum(y, 1)},
    "idle_dropout": {"activate": lambda z: F.dropout(swiglu(z), 0.5, training=False)},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name):
    model, report, x = Spelled(**SPELLINGS[name]), Report(), torch.randn(5, 16)
    compiled = torch.compile(model, backend="samoyeds", options={"base": "eager", "report": report})
    torch.testing.assert_close(compiled(x), model(x))
    assert [(b.rewritten, b.reason) for b in report.blocks] == [(True, None)]


class MaskedRouter(Block):
    """Routing tensors that are written to in place before the experts read them."""

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(self.top_k, -1)
        weights /= weights.sum(-1, keepdim=True)
        weights[0] = 0.5
        ids[ids == 3] = 1
        return self.grouped(x, ids, weights) if self.style == "grouped" else self.gathered(x, ids, weights)


@pytest.mark.parametrize("style", ["grouped", "gathered"])
def test_operands_written_in_place_before_the_block(style):
    model, report, x = MaskedRouter(style), Report(), torch.randn(9, 16)
    compiled = torch.compile(model, backend="samoyeds", options={"base": "eager", "report": report})
    torch.testing.assert_close(compiled(x), model(x))
    assert [(b.rewritten, b.reason) for b in report.blocks] == [(True, None)]


class OnCuda(Block):
    """As transformers runs it on CUDA: ints into the histogram, bf16 products; with or without sentinels."""

    def __init__(self, sentinels, **kwargs):
        super().__init__(**kwargs)
        self.sentinels = sentinels

    def grouped(self, x, ids, weights):
        ids_s, perm = torch.sort(ids.reshape(-1))
        rows, row_weights = x[perm // self.top_k], weights.reshape(-1)[perm]
        counts = torch.histc(ids_s.int(), bins=self.experts, min=0, max=self.experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        mask = (ids_s >= self.experts).unsqueeze(-1)
        if self.sentinels:
            ids_s.clamp_(max=self.experts - 1)
            rows.masked_fill_(mask, 0.0)
        z = F.grouped_mm(rows, self.gate_up.transpose(-2, -1), offs=offsets)
        z = z.masked_fill(mask, 0.0) if self.sentinels else z
        y = F.grouped_mm(self.activate(z), self.down.transpose(-2, -1), offs=offsets)
        y = y.masked_fill(mask, 0.0) if self.sentinels else y
        weighted = y * row_weights.unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0), device=x.device)
        return weighted[inverse].view(x.size(0), self.top_k, x.size(1)).sum(dim=1).to(x.dtype)


@pytest.mark.parametrize("sentinels", [False, True])
def test_cuda_spelling(sentinels):
    """Captured on the meta device, where nothing runs, so that the match alone is tested."""
    found = []

    def backend(gm, example_inputs):
        found.extend(find_blocks(read_graphs(gm), FAMILIES, GraphReport("")))
        return gm.forward

    model = OnCuda(sentinels).to("meta", torch.bfloat16)
    torch.compile(model, backend=backend)(torch.randn(5, 16, device="meta", dtype=torch.bfloat16))
    ((region, _),) = found
    assert (region.family, region.sentinels, region.up.compute_dtype) == ("grouped", sentinels, torch.bfloat16)
