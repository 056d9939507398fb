"""MoE blocks written as Python loops over experts: those Dynamo can capture with its settings, and others."""

import torch
from torch import nn
from torch.nn.functional import one_hot


class Loop(nn.Module):
    """Router and a list of experts; each subclass runs them in another way."""

    def __init__(self, hidden=8, width=12, experts=3, top_k=2):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.experts_count, self.top_k = experts, top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(self.top_k, -1)
        return self.run(x, ids, weights)


class Expert(nn.Module):
    def __init__(self, hidden, width):
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, width, bias=False), nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


# ------------------------------------------------------------------- one graph with Dynamo's capture settings


class OneHotWhere(Loop):
    """transformers 4: Mixtral, Qwen2-MoE."""

    def run(self, x, ids, weights):
        out, mask = torch.zeros_like(x), one_hot(ids, self.experts_count).permute(2, 1, 0)
        for e in range(self.experts_count):
            k, t = torch.where(mask[e])
            out.index_add_(0, t, self.experts[e](x[None, t].reshape(-1, x.shape[1])) * weights[t, k, None])
        return out


class EqualWhere(Loop):
    """mistral-inference."""

    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            out[t] += weights[t, k, None] * expert(x[t])
        return out


class Masked(Loop):
    """DeepSeek's training path."""

    def run(self, x, ids, weights):
        rows, flat = x.repeat_interleave(self.top_k, dim=0), ids.view(-1)
        y = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            y[flat == e] = expert(rows[flat == e])
        return (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)


class NonzeroSelect(Loop):
    """lit-gpt and others."""

    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = (ids == e).nonzero(as_tuple=True)
            rows = expert(x.index_select(0, t)) * weights[t, k].unsqueeze(-1)
            out.index_add_(0, t, rows)
        return out


class NonzeroColumns(Loop):
    """``nonzero()`` as a matrix of coordinates."""

    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            found = (ids == e).nonzero()
            t, k = found[:, 0], found[:, 1]
            out = out.index_add(0, t, expert(x[t]) * weights[t, k, None])
        return out


class SplitCat(Loop):
    """JetMoE, torchtitan's for-loop."""

    def run(self, x, ids, weights):
        flat, perm = ids.reshape(-1).sort(stable=True)
        sizes = one_hot(flat, self.experts_count).sum(0).tolist()
        parts = x[perm // self.top_k].split(sizes, dim=0)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = y * weights.reshape(-1)[perm][:, None]
        return torch.zeros_like(x).index_add(0, perm // self.top_k, y)


CAPTURED = (OneHotWhere, EqualWhere, Masked, NonzeroSelect, NonzeroColumns, SplitCat)


# ----------------------------------------------------------------- not capturable, or not to be compiled then


class BincountList(Loop):
    """DeepSeek-V3's own inference code: a hard error under Dynamo's capture settings."""

    def run(self, x, ids, weights):
        y, counts = torch.zeros_like(x), torch.bincount(ids.flatten(), minlength=self.experts_count).tolist()
        for e, expert in enumerate(self.experts):
            if counts[e] == 0:
                continue
            t, k = torch.where(ids == e)
            y[t] += expert(x[t]) * weights[t, k, None]
        return y


class IfAny(Loop):
    """makeMoE, nanoMoE."""

    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            mask = (ids == e).any(-1)
            if mask.any():
                out[mask] += expert(x[mask]) * (weights * (ids == e))[mask].sum(-1, keepdim=True)
        return out


class SkipEmpty(Loop):
    """``if n == 0: continue`` on the size of an index."""

    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.shape[0] == 0:
                continue
            out.index_add_(0, t, expert(x[t]) * weights[t, k, None])
        return out


class ItemIndex(Loop):
    """``experts[i.item()]``."""

    def run(self, x, ids, weights):
        rows = []
        for t in range(x.shape[0]):
            picked = [self.experts[i.item()](x[t]) * w for i, w in zip(ids[t], weights[t], strict=True)]
            rows.append(torch.stack(picked).sum(0))
        return torch.stack(rows)


class OverUnique(Loop):
    """``for e in torch.unique(ids)``."""

    def run(self, x, ids, weights):
        out = torch.zeros_like(x)
        for e in torch.unique(ids):
            t, k = torch.where(ids == e)
            out.index_add_(0, t, self.experts[int(e)](x[t]) * weights[t, k, None])
        return out


class Binned(Loop):
    """MegaBlocks' binned experts: the largest load, read on the host, is a size of every product."""

    def run(self, x, ids, weights):
        flat, perm = ids.reshape(-1).sort(stable=True)
        counts = torch.bincount(flat, minlength=self.experts_count)
        capacity = counts.max().item()
        position = torch.arange(flat.numel()) - (counts.cumsum(0) - counts)[flat]
        bins = x.new_zeros(self.experts_count, capacity, x.shape[1])
        bins = bins.index_put((flat, position), x[perm // self.top_k])
        gate, up, down = (torch.stack([getattr(e, n).weight for e in self.experts]) for n in ("gate", "up", "down"))
        y = nn.functional.silu(bins @ gate.mT) * (bins @ up.mT) @ down.mT
        y = y[flat, position] * weights.reshape(-1)[perm][:, None]
        return torch.zeros_like(x).index_add(0, perm // self.top_k, y)


class ItemBranch(Loop):
    """Dense experts, with a branch on a value before them."""

    def run(self, x, ids, weights):
        dense = torch.zeros(x.shape[0], self.experts_count).scatter(1, ids, weights)
        if dense.max().item() > 0.5:
            dense = dense * 2
        return sum(expert(x) * dense[:, e, None] for e, expert in enumerate(self.experts))


NOT_CAPTURED = (BincountList, IfAny, SkipEmpty, ItemIndex, OverUnique, Binned, ItemBranch)
