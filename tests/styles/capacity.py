"""P5: experts with a fixed number of places; tokens that find none are dropped."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.styles.parts import GATED, PLAIN, Assignment, Block, Expert, Mlp, parameter, stacked_expert


class Places(Block):
    """Experts as stacks [E, in, out], and the FFN over [E, C, H] in the subclasses' spelling."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "relu", router: str = "renorm"
    ) -> None:
        super().__init__(hidden, width, experts, top_k, activation, router)
        self.wi = parameter(experts, hidden, width)
        self.wg = parameter(experts, hidden, width) if activation in GATED else None
        self.wo = parameter(experts, width, hidden)

    def capacity(self, tokens: int) -> int:
        """Places of an expert, few enough that some token is dropped now and then."""
        return max(-(-tokens * self.top_k // self.num_experts), 1)

    def expert(self, e: int) -> Expert:
        return stacked_expert(e, self.wg, self.wi, self.wo, True)

    def activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        return PLAIN[self.activation](up) if gate is None else GATED[self.activation](gate, up)

    def einsum_experts(self, x_ECM: Tensor) -> Tensor:
        gate = None if self.wg is None else torch.einsum("ecm,emh->ech", x_ECM, self.wg)
        h = self.activate(torch.einsum("ecm,emh->ech", x_ECM, self.wi), gate)
        return torch.einsum("ech,ehm->ecm", h, self.wo)

    def bmm_experts(self, x_ECM: Tensor) -> Tensor:
        gate = None if self.wg is None else torch.bmm(x_ECM, self.wg)
        return torch.bmm(self.activate(torch.bmm(x_ECM, self.wi), gate), self.wo)


def first_come(ids: list[int], experts: int, capacity: int, before: list[int] | None = None) -> list[bool]:
    """Who finds a place when they come one after another and dropped ones count too, as a cumulated sum does."""
    seen = list(before or [0] * experts)
    kept = []
    for e in ids:
        kept.append(seen[e] < capacity)
        seen[e] += 1
    return kept


class GShardTop2(Places):
    """GShard and DeepSpeed: two choices, one-hot dispatch and combine by einsum, auxiliary loss; no noise."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        l_aux, combine, dispatch = self.gating(self.gate(x))
        dispatched = torch.einsum("sec,sm->ecm", dispatch.type_as(x), x)
        combined = torch.einsum("sec,ecm->sm", combine.type_as(x), self.run(dispatched))
        return combined.reshape(shape), l_aux

    def run(self, x_ECM: Tensor) -> Tensor:
        return self.einsum_experts(x_ECM)

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates, experts = F.softmax(logits, dim=1), logits.shape[1]
        capacity = self.capacity(logits.shape[0])
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=experts)
        rest = logits.masked_fill(mask1.bool(), float("-inf"))
        mask2 = F.one_hot(torch.argmax(rest, dim=1), num_classes=experts)
        places1 = torch.cumsum(mask1, dim=0) - 1
        places2 = torch.cumsum(mask2, dim=0) - 1
        places2 += torch.sum(mask1, dim=0, keepdim=True)
        l_aux = torch.mean(torch.mean(gates, dim=0) * torch.mean(mask1.float(), dim=0)) * experts * experts
        mask1 *= torch.lt(places1, capacity)
        mask2 *= torch.lt(places2, capacity)
        place1, place2 = torch.sum(places1 * mask1, dim=1), torch.sum(places2 * mask2, dim=1)
        mask1_float, mask2_float = mask1.type_as(logits), mask2.type_as(logits)
        gate1, gate2 = torch.einsum("se,se->s", gates, mask1_float), torch.einsum("se,se->s", gates, mask2_float)
        total = torch.clamp(gate1 + gate2, min=torch.finfo(gate1.dtype).eps)
        gates1 = torch.einsum("s,se->se", gate1 / total, mask1_float)
        gates2 = torch.einsum("s,se->se", gate2 / total, mask2_float)
        combine1 = torch.einsum("se,sc->sec", gates1, F.one_hot(place1, capacity).type_as(logits))
        combine2 = torch.einsum("se,sc->sec", gates2, F.one_hot(place2, capacity).type_as(logits))
        combine = combine1 + combine2
        return l_aux, combine, combine.bool()

    def assignments(self, x: Tensor) -> list[Assignment]:
        probabilities = F.softmax(self.gate(x.reshape(-1, self.hidden)), dim=1)
        ids = probabilities.topk(2, dim=1).indices.tolist()
        capacity, firsts = self.capacity(len(ids)), [first for first, _ in ids]
        kept1 = first_come(firsts, self.num_experts, capacity)
        counts = [firsts.count(e) for e in range(self.num_experts)]
        kept2 = first_come([second for _, second in ids], self.num_experts, capacity, counts)
        result = []
        for t, (pair, kept) in enumerate(zip(ids, zip(kept1, kept2, strict=True), strict=True)):
            chosen = [e for e, k in zip(pair, kept, strict=True) if k]
            total = sum(probabilities[t, e] for e in chosen)
            result += [(t, e, probabilities[t, e] / total) for e in chosen]
        return result


class DeepSpeedChunks(GShardTop2):
    """DeepSpeed's experts: [E, C, M] in chunks, one module each, concatenated."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, activation: str = "silu") -> None:
        Block.__init__(self, hidden, width, experts, top_k, activation, "renorm")
        self.experts = nn.ModuleList(Mlp(hidden, width, activation) for _ in range(experts))

    def run(self, x_ECM: Tensor) -> Tensor:
        chunks = x_ECM.chunk(self.num_experts, dim=0)
        return torch.cat([layer(chunk) for layer, chunk in zip(self.experts, chunks, strict=True)], dim=0)

    def expert(self, e: int) -> Expert:
        return self.experts[e].canonical()


class SwitchTop1(Places):
    """Switch in the style of mesh TensorFlow: one choice, capacity within each sequence."""

    def forward(self, x: Tensor) -> Tensor:
        capacity = self.capacity(x.shape[1])
        probs = F.softmax(self.gate(x), dim=-1)
        gate, index = probs.max(dim=-1)
        mask = F.one_hot(index, self.num_experts).to(x.dtype)
        position = torch.cumsum(mask, dim=1) * mask - 1.0
        mask = mask * (position < capacity).to(x.dtype)
        place = F.one_hot((position * mask).sum(dim=-1).long(), capacity).to(x.dtype)
        dispatch = mask.unsqueeze(-1) * place.unsqueeze(-2)
        combine = gate[..., None, None] * dispatch
        h = torch.einsum("bsec,bsm->ebcm", dispatch, x)
        up = torch.einsum("ebcm,emh->ebch", h, self.wi)
        value = None if self.wg is None else torch.einsum("ebcm,emh->ebch", h, self.wg)
        y = torch.einsum("ebch,ehm->ebcm", self.activate(up, value), self.wo)
        return torch.einsum("bsec,ebcm->bsm", combine, y)

    def assignments(self, x: Tensor) -> list[Assignment]:
        result, length = [], x.shape[1]
        for b, rows in enumerate(x):
            gates, ids = F.softmax(self.gate(rows), dim=-1).max(dim=-1)
            kept = first_come(ids.tolist(), self.num_experts, self.capacity(length))
            result += [(b * length + s, int(ids[s]), gates[s]) for s in range(length) if kept[s]]
        return result


class PaddedBuffer(Places):
    """Slots written into a buffer [E * C + 1, H], whose last row takes what is dropped; ``bmm``; read back."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        tokens, experts, capacity = x.shape[0], self.num_experts, self.capacity(x.shape[0])
        flat = ids.reshape(-1)
        position = (F.one_hot(flat, experts).cumsum(dim=0) - 1).gather(1, flat.unsqueeze(1)).squeeze(1)
        slot = torch.where(position < capacity, flat * capacity + position, experts * capacity)
        buffer = x.new_zeros(experts * capacity + 1, shape[-1])
        buffer[slot] = x.repeat_interleave(self.top_k, dim=0)
        y = self.bmm_experts(buffer[:-1].view(experts, capacity, shape[-1]))
        y = torch.cat([y.reshape(experts * capacity, shape[-1]), x.new_zeros(1, shape[-1])])
        return (y[slot].view(tokens, self.top_k, -1) * weights.unsqueeze(-1)).sum(dim=1).reshape(shape)

    def assignments(self, x: Tensor) -> list[Assignment]:
        weights, ids = self.route(x.reshape(-1, self.hidden))
        kept = first_come(ids.flatten().tolist(), self.num_experts, self.capacity(len(ids)))
        slots = [(t, k) for t in range(len(ids)) for k in range(self.top_k)]
        return [(t, int(ids[t, k]), weights[t, k]) for (t, k), keep in zip(slots, kept, strict=True) if keep]


class ExpertChoice(Places):
    """Every expert picks its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        probs = F.softmax(self.gate(x), dim=-1)
        gates, tokens = torch.topk(probs.t(), self.capacity(x.shape[0]), dim=-1)
        y = self.bmm_experts(x[tokens]) * gates.unsqueeze(-1)
        out = torch.zeros_like(x).index_add_(0, tokens.reshape(-1), y.reshape(-1, shape[-1]))
        return out.reshape(shape)

    def assignments(self, x: Tensor) -> list[Assignment]:
        probs = F.softmax(self.gate(x.reshape(-1, self.hidden)), dim=-1)
        capacity = self.capacity(len(probs))
        chosen = [probs[:, e].sort(descending=True).indices[:capacity].tolist() for e in range(self.num_experts)]
        return [(t, e, probs[t, e]) for e, tokens in enumerate(chosen) for t in tokens]


class SoftMoE(Places):
    """Soft MoE: slots are mixtures of all tokens; only the experts in the middle are what other blocks have."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, activation: str = "plain_gelu") -> None:
        super().__init__(hidden, width, experts, top_k, activation)
        self.phi = parameter(hidden, experts, top_k)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("bnd,des->bnes", x, self.phi)
        into = logits.softmax(dim=1)
        back = logits.flatten(2).softmax(dim=-1).view(logits.shape)
        slots = torch.einsum("bnd,bnes->ebsd", x, into)
        experts, batch, places, hidden = slots.shape
        y = self.bmm_experts(slots.reshape(experts, batch * places, hidden)).view(slots.shape)
        return torch.einsum("ebsd,bnes->bnd", y, back)
