"""P5: rows brought to places and back by one-hot tensors over tokens, experts and places."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.styles.capacity import GShardTop2, Places, first_come
from tests.styles.parts import Assignment

EPS = torch.finfo(torch.float32).eps


class OneHot(Places):
    """[S, E, C] tensors for dispatch and combination; subclasses make the combination."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        l_aux, combine, dispatch = self.gating(self.gate(x))
        y = self.einsum_experts(torch.einsum("sec,sm->ecm", dispatch.type_as(x), x))
        return torch.einsum("sec,ecm->sm", combine.type_as(x), y).reshape(shape), l_aux

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, combination and dispatch."""
        raise NotImplementedError

    def probabilities(self, x: Tensor) -> Tensor:
        return F.softmax(self.gate(x.reshape(-1, self.hidden)), dim=1)


class DeepSpeedTopK(OneHot):
    """DeepSpeed's top-k gating: one mask for all choices, places in the order of tokens, gates of the kept ones."""

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top_gate, top_idx = torch.topk(logits, k=self.top_k, dim=1)
        gates = F.softmax(logits, dim=1)
        mask = torch.zeros_like(gates, dtype=torch.bool).scatter_(1, top_idx, 1)
        l_aux = torch.mean(gates.mean(dim=0) * mask.float().mean(dim=0)) * self.num_experts**2 / self.top_k
        capacity = self.capacity(logits.shape[0])
        mask, places = self.drop(mask, torch.zeros_like(logits).scatter(1, top_idx, top_gate), capacity)
        gates = gates * mask
        gates = gates / torch.clamp(torch.sum(gates, dim=-1, keepdim=True), min=EPS)
        combine = torch.einsum("se,sec->sec", gates, F.one_hot(places * mask, capacity).float())
        return l_aux, combine, combine.bool()

    def drop(self, mask: Tensor, top_gates: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Who stays, and where."""
        places = torch.cumsum(mask, dim=0) - 1
        mask *= torch.lt(places, capacity)
        return mask, places

    def assignments(self, x: Tensor) -> list[Assignment]:
        probabilities = self.probabilities(x)
        chosen = probabilities.topk(self.top_k, dim=1).indices
        result = []
        kept = self.kept(chosen, self.gate(x.reshape(-1, self.hidden)))
        for t, row in enumerate(chosen.tolist()):
            mine = [e for e in row if t in kept[e]]
            total = sum(probabilities[t, e] for e in mine)
            result += [(t, e, probabilities[t, e] / total) for e in mine]
        return result

    def kept(self, chosen: Tensor, logits: Tensor) -> list[list[int]]:
        """The tokens that each expert keeps."""
        capacity = self.capacity(len(chosen))
        return [[t for t, row in enumerate(chosen.tolist()) if e in row][:capacity] for e in range(self.num_experts)]


class DeepSpeedTopKByGate(DeepSpeedTopK):
    """The same, where the tokens with the largest logits of an expert stay."""

    def capacity(self, tokens: int) -> int:
        return min(super().capacity(tokens), tokens)

    def drop(self, mask: Tensor, top_gates: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        _, best = torch.topk(top_gates, k=capacity, dim=0, sorted=False)
        mask = torch.logical_and(mask, torch.zeros_like(top_gates).scatter(0, best, 1))
        return mask, torch.cumsum(mask, dim=0) - 1

    def kept(self, chosen: Tensor, logits: Tensor) -> list[list[int]]:
        scores = torch.zeros_like(logits).scatter(1, chosen, logits.gather(1, chosen))
        best = scores.sort(dim=0, descending=True).indices[: self.capacity(len(logits))]
        return [best[:, e].tolist() for e in range(self.num_experts)]


class DeepSpeedTop1(OneHot):
    """DeepSpeed's top-1 gating without noise: gates of the kept tokens as they are."""

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates = F.softmax(logits, dim=1)
        mask = F.one_hot(torch.argmax(gates, dim=1), num_classes=self.num_experts)
        l_aux = torch.sum(gates.mean(dim=0) * mask.float().mean(dim=0)) * self.num_experts
        capacity = self.capacity(logits.shape[0])
        mask, places = self.drop(mask, gates, capacity)
        gates = gates * mask.float()
        place = F.one_hot(torch.sum(places * mask, dim=1), num_classes=capacity).float()
        combine = torch.einsum("se,sc->sec", gates, place)
        return l_aux, combine, combine.bool()

    def drop(self, mask: Tensor, gates: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """Who stays, and where."""
        places = torch.cumsum(mask, dim=0) - 1
        return mask * torch.lt(places, capacity), places

    def assignments(self, x: Tensor) -> list[Assignment]:
        gates, ids = self.probabilities(x).max(dim=1)
        kept = self.kept(ids, gates)
        return [(t, e, gates[t]) for t, e in enumerate(ids.tolist()) if kept[t]]

    def kept(self, ids: Tensor, gates: Tensor) -> list[bool]:
        return first_come(ids.tolist(), self.num_experts, self.capacity(len(ids)))


class DeepSpeedTop1Selected(DeepSpeedTop1):
    """The same, where every expert selects its tokens before they are counted; by gate, which is no noise."""

    def capacity(self, tokens: int) -> int:
        return min(super().capacity(tokens), tokens)

    def drop(self, mask: Tensor, gates: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        best = torch.topk(mask * gates, k=capacity, dim=0)[1]
        mask = mask * torch.zeros_like(mask).scatter_(0, best, 1)
        return mask, torch.cumsum(mask, dim=0) - 1

    def kept(self, ids: Tensor, gates: Tensor) -> list[bool]:
        capacity = self.capacity(len(ids))
        better = [int(((ids == e) & (gates > gate)).sum()) for e, gate in zip(ids, gates, strict=True)]
        return [number < capacity for number in better]


def exclusive(mask: Tensor) -> Tensor:
    """How many came before, along the last axis but one."""
    return F.pad(mask, (0, 0, 1, -1)).cumsum(dim=-2)


class LucidrainsTop2(Places):
    """Two choices within each sequence, float masks, broadcast products; as in lucidrains' mixture-of-experts."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int, activation: str = "relu", threshold: float = 0.0
    ) -> None:
        super().__init__(hidden, width, experts, top_k, activation)
        self.threshold = threshold

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dispatch, combine, loss = self.gating(self.gate(x))
        rows = torch.einsum("bnd,bnec->ebcd", x, dispatch)
        e, b, c, d = rows.shape
        y = self.bmm_experts(rows.reshape(e, b * c, d)).reshape(e, b, c, d)
        return torch.einsum("ebcd,bnec->bnd", y, combine), loss

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw, experts = logits.softmax(dim=-1), self.num_experts
        gate_1, index_1 = raw.topk(k=1, dim=-1)
        gate_1, index_1 = gate_1.squeeze(-1), index_1.squeeze(-1)
        mask_1 = F.one_hot(index_1, experts).float()
        gate_2, index_2 = (raw * (1.0 - mask_1)).topk(k=1, dim=-1)
        gate_2, index_2 = gate_2.squeeze(-1), index_2.squeeze(-1)
        mask_2 = F.one_hot(index_2, experts).float()
        total = gate_1 + gate_2 + 1e-9
        gate_1, gate_2 = gate_1 / total, gate_2 / total
        loss = (raw.mean(dim=-2) * mask_1.mean(dim=-2)).mean() * float(experts**2)
        if self.threshold:
            mask_2 *= (gate_2 > self.threshold).unsqueeze(-1).float()
        capacity = self.capacity(logits.shape[1])
        place_1 = exclusive(mask_1) * mask_1
        mask_1 *= (place_1 < float(capacity)).float()
        count_1, flat_1 = mask_1.sum(dim=-2, keepdim=True), mask_1.sum(dim=-1)
        place_1 = place_1.sum(dim=-1)
        gate_1 = gate_1 * flat_1
        place_2 = exclusive(mask_2) + count_1
        place_2 *= mask_2
        mask_2 *= (place_2 < float(capacity)).float()
        flat_2, place_2 = mask_2.sum(dim=-1), place_2.sum(dim=-1)
        gate_2 = gate_2 * flat_2
        combine = self.table(gate_1, flat_1, index_1, place_1, capacity)
        combine = combine + self.table(gate_2, flat_2, index_2, place_2, capacity)
        return combine.bool().to(combine), combine, loss

    def table(self, gate: Tensor, flat: Tensor, index: Tensor, place: Tensor, capacity: int) -> Tensor:
        """[B, N, E, C]."""
        at = (place.long()[..., None] == torch.arange(capacity)).float()
        return (
            gate[..., None, None] * flat[..., None, None] * F.one_hot(index, self.num_experts)[..., None]
            * at[..., None, :]
        )  # fmt: skip

    def assignments(self, x: Tensor) -> list[Assignment]:
        result, length, experts = [], x.shape[1], range(self.num_experts)
        capacity = self.capacity(length)
        for b, rows in enumerate(x):
            weights, ids = F.softmax(self.gate(rows), dim=-1).topk(2, dim=-1)
            weights = weights / weights.sum(dim=-1, keepdim=True)
            firsts = ids[:, 0].tolist()
            kept = first_come(firsts, self.num_experts, capacity)
            result += [(b * length + s, e, weights[s, 0]) for s, e in enumerate(firsts) if kept[s]]
            seconds = [s for s in range(length) if weights[s, 1] > self.threshold]
            before = [min(firsts.count(e), capacity) for e in experts]
            kept = first_come([int(ids[s, 1]) for s in seconds], self.num_experts, capacity, before)
            pairs = zip(seconds, kept, strict=True)
            result += [(b * length + s, int(ids[s, 1]), weights[s, 1]) for s, keep in pairs if keep]
        return result


class GShardMatmul(GShardTop2):
    """DeepSpeed without einsum: broadcast products, and matrix products of reshaped tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        l_aux, combine, dispatch = self.gating(self.gate(x))
        s, e, c = dispatch.shape
        rows = torch.matmul(dispatch.type_as(x).reshape(s, e * c).t(), x).reshape(e, c, -1)
        y = self.bmm_experts(rows)
        return torch.matmul(combine.type_as(x).reshape(s, e * c), y.reshape(e * c, -1)).reshape(shape), l_aux

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates, experts = F.softmax(logits, dim=1), logits.shape[1]
        capacity = self.capacity(logits.shape[0])
        mask1 = F.one_hot(torch.argmax(gates, dim=1), num_classes=experts)
        mask2 = F.one_hot(torch.argmax(logits.masked_fill(mask1.bool(), float("-inf")), dim=1), num_classes=experts)
        places1 = torch.cumsum(mask1, dim=0) - 1
        places2 = torch.cumsum(mask2, dim=0) - 1 + torch.sum(mask1, dim=0, keepdim=True)
        l_aux = torch.mean(gates.mean(dim=0) * mask1.float().mean(dim=0)) * experts * experts
        mask1, mask2 = mask1 * torch.lt(places1, capacity), mask2 * torch.lt(places2, capacity)
        place1, place2 = torch.sum(places1 * mask1, dim=1), torch.sum(places2 * mask2, dim=1)
        mask1, mask2 = mask1.type_as(logits), mask2.type_as(logits)
        gate1, gate2 = (gates * mask1).sum(dim=1), (gates * mask2).sum(dim=1)
        total = torch.clamp(gate1 + gate2, min=EPS)
        gates1, gates2 = (gate1 / total).unsqueeze(-1) * mask1, (gate2 / total).unsqueeze(-1) * mask2
        at1, at2 = F.one_hot(place1, capacity).type_as(logits), F.one_hot(place2, capacity).type_as(logits)
        combine = gates1.unsqueeze(2) * at1.unsqueeze(1) + gates2.unsqueeze(2) * at2.unsqueeze(1)
        return l_aux, combine, combine.bool()


class FlatPriority(OneHot):
    """Choices of all tokens in one row, first choices first; [S, K, E, C] summed over the choices."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        tokens, experts, capacity = x.shape[0], self.num_experts, self.capacity(x.shape[0])
        mask = F.one_hot(ids, experts)
        flat = mask.transpose(0, 1).reshape(self.top_k * tokens, experts)
        position = (flat.cumsum(dim=0) * flat).sum(dim=-1) - 1
        place = position.reshape(self.top_k, tokens).t()
        at = (place.unsqueeze(-1) == torch.arange(capacity)).to(x.dtype)
        table = mask.to(x.dtype).unsqueeze(-1) * at.unsqueeze(2)
        combine = (weights[..., None, None] * table).sum(dim=1)
        y = self.bmm_experts(torch.einsum("sec,sm->ecm", table.sum(dim=1), x))
        return torch.einsum("sec,ecm->sm", combine, y).reshape(shape)

    def assignments(self, x: Tensor) -> list[Assignment]:
        weights, ids = self.route(x.reshape(-1, self.hidden))
        slots = [(t, k) for k in range(self.top_k) for t in range(len(ids))]
        kept = first_come([int(ids[t, k]) for t, k in slots], self.num_experts, self.capacity(len(ids)))
        return [(t, int(ids[t, k]), weights[t, k]) for (t, k), keep in zip(slots, kept, strict=True) if keep]


def marks(indices: Tensor, size: int) -> Tensor:
    """Ones scattered into zeros, [.., size]."""
    out = torch.zeros(*indices.shape[:-1], size, dtype=indices.dtype)
    return out.scatter_(out.dim() - 1, indices, 1)


class FairseqTop2(GShardTop2):
    """fairseq's top-2 gate: one-hot rows of experts and of places by scatter, outer products by ``bmm``."""

    def gating(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates, experts = F.softmax(logits, dim=1), logits.shape[1]
        capacity = self.capacity(logits.shape[0])
        mask1 = marks(torch.argmax(gates, dim=1, keepdim=True), experts)
        rest = logits.masked_fill(mask1.bool(), float("-inf"))
        mask2 = marks(torch.argmax(rest, dim=1, keepdim=True), experts)
        gate1, gate2 = (gates * mask1).sum(dim=1), (gates * mask2).sum(dim=1)
        places1, places2 = torch.cumsum(mask1, dim=0) - 1, torch.cumsum(mask2, dim=0) - 1
        places2 += torch.sum(mask1, dim=0, keepdim=True)
        l_aux = torch.mean(gates.mean(dim=0) * mask1.to(gates.dtype).mean(dim=0)) * experts * experts
        mask1, mask2 = mask1 * torch.lt(places1, capacity), mask2 * torch.lt(places2, capacity)
        kept1, kept2 = gate1 * mask1.sum(dim=1), gate2 * mask2.sum(dim=1)
        total = torch.clamp(kept1 + kept2, min=EPS)
        combine = self.table(kept1 / total, mask1, places1, capacity)
        combine = combine + self.table(kept2 / total, mask2, places2, capacity)
        return l_aux, combine, combine.bool()

    def table(self, gate: Tensor, mask: Tensor, places: Tensor, capacity: int) -> Tensor:
        """[S, E, C] of one choice."""
        place = marks(torch.sum(places * mask, dim=1).unsqueeze(-1), capacity)
        rows = gate.unsqueeze(-1) * mask.to(gate.dtype)
        return torch.bmm(rows.unsqueeze(-1), place.to(gate.dtype).unsqueeze(1))
