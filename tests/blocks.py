"""Hand-written MoE blocks in the two surfaces that transformers produces, small enough to bend in tests."""

import pytest
import torch
from torch import nn


class Block(nn.Module):
    """Router and experts. ``style`` is ``grouped`` or ``gathered``; ``activate`` maps packed rows [S, 2I] to [S, I]."""

    def __init__(self, style="grouped", hidden=16, width=24, experts=4, top_k=2, activate=None, gated=True, bias=False):
        if style == "grouped":
            pytest.importorskip("transformers", reason="registers the products of these blocks")
        super().__init__()
        self.style, self.top_k, self.experts = style, top_k, experts
        self.activate = activate or swiglu
        packed = 2 * width if gated else width
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, packed, hidden) * 0.3)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * 0.3)
        self.gate_up_bias = nn.Parameter(torch.randn(experts, packed)) if bias else None
        self.down_bias = nn.Parameter(torch.randn(experts, hidden)) if bias else None

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(self.top_k, -1)
        return self.grouped(x, ids, weights) if self.style == "grouped" else self.gathered(x, ids, weights)

    def grouped(self, x, ids, weights):
        ids_s, perm = torch.sort(ids.reshape(-1))
        rows, row_weights = x[perm // self.top_k], weights.reshape(-1)[perm]
        counts = torch.histc(ids_s.float(), bins=self.experts, min=0, max=self.experts - 1)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        z = grouped_mm(rows, self.gate_up.transpose(-2, -1), offsets)
        if self.gate_up_bias is not None:
            z.add_(self.gate_up_bias[ids_s])
        y = grouped_mm(self.activate(z), self.down.transpose(-2, -1), offsets)
        if self.down_bias is not None:
            y.add_(self.down_bias[ids_s])
        weighted = y * row_weights.unsqueeze(-1)
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0), device=x.device)
        return weighted[inverse].view(x.size(0), self.top_k, x.size(1)).sum(dim=1).to(x.dtype)

    def gathered(self, x, ids, weights):
        rows, flat_ids, flat_weights = x.repeat_interleave(self.top_k, dim=0), ids.reshape(-1), weights.reshape(-1)
        z = torch.bmm(self.gate_up[flat_ids], rows.unsqueeze(-1)).squeeze(-1)
        if self.gate_up_bias is not None:
            z.add_(self.gate_up_bias[flat_ids])
        y = torch.bmm(self.down[flat_ids], self.activate(z).unsqueeze(-1)).squeeze(-1)
        if self.down_bias is not None:
            y.add_(self.down_bias[flat_ids])
        weighted = y * flat_weights.unsqueeze(-1)
        return weighted.view(x.size(0), self.top_k, x.size(1)).sum(dim=1).to(x.dtype)


def swiglu(z):
    gate, up = z.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def grouped_mm(rows, weight, offsets):
    """What transformers calls under `torch.compile` for weights that are not bf16."""
    import transformers.integrations.moe  # noqa: F401 - registers the op

    return torch.ops.transformers.grouped_mm_fallback(rows.to(weight.dtype), weight, offs=offsets)
