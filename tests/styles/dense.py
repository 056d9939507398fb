"""P4: every expert runs on every token; the weights of those that were not chosen are zero (or never were)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.styles.gathered import Separate
from tests.styles.loops import Loop
from tests.styles.parts import GATED, Assignment, Block, Expert, Mlp, parameter, stacked_expert


class DenseEinsum(Separate):
    """Einsums over all experts; [T, E] weights written in the ways of the subclasses.

    Stored [E, in, out] (``transposed``) unless asked otherwise.
    """

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"transposed": True, **axes})

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights_TE = self.dense_weights(x)
        up, down = ("th,ehi->tei", "tei,eih->teh") if self.transposed else ("th,eih->tei", "tei,ehi->teh")
        gate, value = torch.einsum(up, x, self.w1), torch.einsum(up, x, self.w3)
        if self.b1 is not None:
            gate, value = gate + self.b1, value + self.b3
        y = torch.einsum(down, GATED[self.activation](gate, value), self.w2)
        if self.b2 is not None:
            y = y + self.b2
        return torch.einsum("teh,te->th", y, weights_TE).reshape(shape)

    def dense_weights(self, x_TH: Tensor) -> Tensor:
        weights, ids = self.route(x_TH)
        return torch.zeros(len(ids), self.num_experts, dtype=weights.dtype, device=ids.device).scatter(1, ids, weights)


class SoftmaxScattered(DenseEinsum):
    """Logits outside the top k are minus infinity before the softmax (makeMoE and its kin)."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"router": "topk_softmax", **axes})

    def dense_weights(self, x_TH: Tensor) -> Tensor:
        logits = self.gate(x_TH)
        values, ids = logits.topk(self.top_k, dim=-1)
        return F.softmax(torch.full_like(logits, float("-inf")).scatter(-1, ids, values), dim=-1)


class OneHotSum(DenseEinsum):
    """One-hot vectors of the chosen experts, weighted and summed over k."""

    def dense_weights(self, x_TH: Tensor) -> Tensor:
        weights, ids = self.route(x_TH)
        return (F.one_hot(ids, self.num_experts).to(weights.dtype) * weights.unsqueeze(-1)).sum(dim=1)


class MaskedProbabilities(DenseEinsum):
    """Probabilities outside a mask of the chosen experts are filled with zero, and normalised again if ``renorm``."""

    def dense_weights(self, x_TH: Tensor) -> Tensor:
        probs = F.softmax(self.gate(x_TH), dim=-1)
        ids = probs.topk(self.top_k, dim=-1).indices
        mask = torch.zeros_like(probs, dtype=torch.bool).scatter(1, ids, True)
        probs = probs.masked_fill(~mask, 0.0)
        return probs / probs.sum(dim=-1, keepdim=True) if self.router == "renorm" else probs


class MultipliedMask(DenseEinsum):
    """Probabilities times a mask of ones at the chosen experts."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"router": "softmax", **axes})

    def dense_weights(self, x_TH: Tensor) -> Tensor:
        probs = F.softmax(self.gate(x_TH), dim=-1)
        _, ids = torch.topk(probs, self.top_k)
        return probs * torch.zeros_like(probs).scatter_(1, ids, 1.0)


class Threshold(DenseEinsum):
    """Probabilities below the k-th are zeroed: more than k experts where values tie, so not provably top-k."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"router": "softmax", **axes})

    def dense_weights(self, x_TH: Tensor) -> Tensor:
        probs = F.softmax(self.gate(x_TH), dim=-1)
        least = probs.topk(self.top_k, dim=-1).values[:, -1:]
        return torch.where(probs < least, 0.0, probs)


class SoftMixture(DenseEinsum):
    """A plain mixture: every expert counts for every token."""

    def dense_weights(self, x_TH: Tensor) -> Tensor:
        return F.softmax(self.gate(x_TH), dim=-1)

    def assignments(self, x: Tensor) -> list[Assignment]:
        weights = self.dense_weights(x.reshape(-1, self.hidden))
        return [(t, e, w) for t, row in enumerate(weights) for e, w in enumerate(row)]


class RepeatBmm(Block):
    """transformers 4.x GPT-OSS in eval: tokens repeated for every expert, ``bmm``, packed interleaved, sum over E."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "clamped", bias: bool = True,
        router: str = "topk_softmax",
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        self.gate_up_proj, self.down_proj = parameter(experts, hidden, 2 * width), parameter(experts, width, hidden)
        self.gate_up_proj_bias = parameter(experts, 2 * width, scale=0.5) if bias else None
        self.down_proj_bias = parameter(experts, hidden, scale=0.5) if bias else None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch = hidden_states.shape[0]
        flat = hidden_states.reshape(-1, self.hidden)
        weights, ids = self.route(flat)
        scores = torch.zeros(flat.shape[0], self.num_experts, dtype=weights.dtype, device=flat.device)
        scores.scatter_(1, ids, weights)
        x = flat.repeat(self.num_experts, 1).view(self.num_experts, -1, self.hidden)
        gate_up = torch.bmm(x, self.gate_up_proj)
        if self.gate_up_proj_bias is not None:
            gate_up = gate_up + self.gate_up_proj_bias[..., None, :]
        h = GATED[self.activation](gate_up[..., ::2], gate_up[..., 1::2])
        y = torch.bmm(h, self.down_proj)
        if self.down_proj_bias is not None:
            y = y + self.down_proj_bias[..., None, :]
        y = y.view(self.num_experts, batch, -1, self.hidden)
        y = y * scores.transpose(0, 1).view(self.num_experts, batch, -1)[..., None]
        return y.sum(dim=0), scores

    def expert(self, e: int) -> Expert:
        w, b = self.gate_up_proj[e].t(), self.gate_up_proj_bias
        biases = (None, None) if b is None else (b[e, ::2], b[e, 1::2])
        last = None if self.down_proj_bias is None else self.down_proj_bias[e]
        return Expert(w[::2], w[1::2], self.down_proj[e].t(), *biases, last)


class LoopWeighted(Loop):
    """Each expert runs on all tokens, times the weight that the token gives it."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, layer in enumerate(self.experts):
            out += (weights * (ids == e)).sum(dim=-1, keepdim=True) * layer(x)
        return out.reshape(shape)


class LoopColumns(Loop):
    """Each expert runs on all tokens, times its column of the scattered weights."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        scores = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype, device=x.device).scatter_(1, ids, weights)
        out = 0
        for e in range(self.num_experts):
            out = out + scores[:, e, None] * self.experts[e](x)
        return out


class StackGather(Loop):
    """All results stacked, [T, E, H]; those of the chosen experts gathered."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        outs = torch.stack([layer(x) for layer in self.experts], dim=1)
        chosen = torch.gather(outs, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return (chosen * weights.unsqueeze(-1)).sum(dim=1)


class StackEinsum(Loop):
    """All results stacked, [T, E, H]; combined with the scattered weights."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        scores = torch.zeros(x.shape[0], self.num_experts, dtype=x.dtype, device=x.device).scatter_(1, ids, weights)
        outs = torch.stack([layer(x) for layer in self.experts], dim=1)
        return torch.einsum("te,teh->th", scores, outs)


class Llama4(Block):
    """Llama 4: sigmoid of scattered logits multiplies the repeated tokens before the experts; added to the shared one.

    Exact without biases only: an expert that was not chosen gets zeros.
    """

    weight_before = True

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "silu", shared: bool = True
    ) -> None:
        super().__init__(hidden, width, experts, top_k, activation, "softmax")
        self.gate_up_proj, self.down_proj = parameter(experts, hidden, 2 * width), parameter(experts, width, hidden)
        self.shared_expert: nn.Module | None = Mlp(hidden, width) if shared else None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, self.hidden)
        logits = self.gate(flat)
        values, ids = torch.topk(logits, self.top_k, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, ids, values)
        scores = torch.sigmoid(scores.float()).to(scores.dtype)
        rows = flat.repeat(self.num_experts, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(self.num_experts, -1, self.hidden), self.gate_up_proj).chunk(2, dim=-1)
        routed = torch.bmm(GATED[self.activation](gate, up), self.down_proj).view(-1, self.hidden)
        routed = routed.reshape(self.num_experts, -1, self.hidden)
        if self.shared_expert is None:
            return routed.sum(dim=0).view(shape), logits
        out = self.shared_expert(flat)
        out.add_(routed.sum(dim=0))
        return out.view(shape), logits

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = torch.topk(self.gate(x_TH), self.top_k, dim=1)
        return values.float().sigmoid().to(x_TH.dtype), ids

    def expert(self, e: int) -> Expert:
        gate, up = self.gate_up_proj.chunk(2, dim=2)
        return stacked_expert(e, gate, up, self.down_proj, True)

    def shared_part(self, x_TH: Tensor) -> Tensor:
        return torch.zeros_like(x_TH) if self.shared_expert is None else self.shared_expert(x_TH)
