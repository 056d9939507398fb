"""P3: a static loop over the experts, unrolled by Dynamo: gather the tokens of each, run it, put the results back."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.styles.parts import GATED, PLAIN, Block, Expert, Mlp, PackedMlp, parameter, stacked_expert


class Loop(Block):
    """Experts are modules in a list."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int,
        activation: str = "silu", bias: bool = False, router: str = "renorm", packed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        kind = PackedMlp if packed else Mlp
        self.experts = nn.ModuleList(kind(hidden, width, activation, bias) for _ in range(experts))

    def expert(self, e: int) -> Expert:
        return self.experts[e].canonical()


class MixtralLoop(Loop):
    """transformers 4.x Mixtral: one-hot mask by expert, ``where``, ``index_add_``; the router's logits are returned."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, hidden = hidden_states.shape
        flat = hidden_states.view(-1, hidden)
        logits = self.gate(flat)
        weights = F.softmax(logits, dim=1, dtype=torch.float)
        weights, selected = torch.topk(weights, self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(flat.dtype)
        final = torch.zeros((batch * length, hidden), dtype=flat.dtype, device=flat.device)
        mask = F.one_hot(selected, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            layer = self.experts[e]
            slot, token = torch.where(mask[e])
            current = flat[None, token].reshape(-1, hidden)
            result = layer(current) * weights[token, slot, None]
            final.index_add_(0, token, result.to(flat.dtype))
        return final.reshape(batch, length, hidden), logits


class QwenLoop(Loop):
    """transformers 4.x Qwen2-MoE: the same loop, and a shared expert behind a sigmoid gate."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"router": "softmax", **axes})
        self.shared_expert = Mlp(hidden, 2 * width)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        batch, length, hidden = hidden_states.shape
        flat = hidden_states.view(-1, hidden)
        weights, selected = self.route(flat)
        final = torch.zeros((batch * length, hidden), dtype=flat.dtype, device=flat.device)
        mask = F.one_hot(selected, num_classes=self.num_experts).permute(2, 1, 0)
        for e, layer in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            current = flat[None, token].reshape(-1, hidden)
            final.index_add_(0, token, (layer(current) * weights[token, slot, None]).to(flat.dtype))
        return (final + self.shared_part(flat)).reshape(batch, length, hidden)

    def shared_part(self, x_TH: Tensor) -> Tensor:
        return F.sigmoid(self.shared_expert_gate(x_TH)) * self.shared_expert(x_TH)


class MistralLoop(Loop):
    """mistral-inference: ``where(selected == e)`` and ``results[tokens] += ...``, on flat tokens."""

    def forward(self, inputs: Tensor) -> Tensor:
        weights, selected = torch.topk(self.gate(inputs), self.top_k)
        weights = F.softmax(weights, dim=1, dtype=torch.float).to(inputs.dtype)
        results = torch.zeros_like(inputs)
        for e, layer in enumerate(self.experts):
            token, slot = torch.where(selected == e)
            results[token] += weights[token, slot, None] * layer(inputs[token])
        return results


class LitGptLoop(Loop):
    """lit-gpt: all masks at once by comparison with ``arange``, unpacked by iteration."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.size()
        x = x.view(-1, hidden)
        probs, indices = torch.topk(self.gate(x), self.top_k)
        probs = probs.softmax(dim=1, dtype=torch.float).to(dtype=x.dtype)
        masks = indices.unsqueeze(-1) == torch.arange(self.num_experts, device=x.device)
        masks = masks.permute(2, 0, 1)
        y = torch.zeros_like(x)
        for mask, layer in zip(masks, self.experts, strict=True):
            token, slot = torch.where(mask)
            y[token] += probs[token, slot, None] * layer(x[token])
        return y.view(batch, length, hidden)


class DeepSeekTrainLoop(Loop):
    """DeepSeek's training path: tokens repeated k times, read and written through boolean masks of the flat ids."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, shared: bool = True, **axes: object) -> None:
        super().__init__(hidden, width, experts, top_k, **{"router": "sigmoid_bias", **axes})
        self.shared_experts = Mlp(hidden, width) if shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        identity, shape = hidden_states, hidden_states.shape
        weights, ids = self.route(hidden_states.view(-1, shape[-1]))
        hidden_states = hidden_states.view(-1, shape[-1])
        flat_ids = ids.view(-1)
        hidden_states = hidden_states.repeat_interleave(self.top_k, dim=0)
        y = torch.empty_like(hidden_states)
        for e, layer in enumerate(self.experts):
            y[flat_ids == e] = layer(hidden_states[flat_ids == e])
        y = (y.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        y = y.to(hidden_states.dtype).view(*shape)
        return y if self.shared_experts is None else y + self.shared_experts(identity)

    def shared_part(self, x_TH: Tensor) -> Tensor:
        return torch.zeros_like(x_TH) if self.shared_experts is None else self.shared_experts(x_TH)


class BoolMaskLoop(Loop):
    """Tutorials: any slot of the token is expert e's; its weight is picked by a mask as well; read, add, write back."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e, layer in enumerate(self.experts):
            chosen = ids == e
            token_mask = chosen.any(dim=-1)
            weight = (weights * chosen).sum(dim=-1)
            out[token_mask] += layer(x[token_mask]) * weight[token_mask].unsqueeze(-1)
        return out


class BoolMaskSlotLoop(Loop):
    """One pass for each slot: ``out[mask] += weights[mask] * expert(x[mask])``."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for k in range(self.top_k):
            for e, layer in enumerate(self.experts):
                mask = ids[:, k] == e
                out[mask] += weights[mask, k : k + 1] * layer(x[mask])
        return out


class NonzeroLoop(Loop):
    """``nonzero``, ``index_select`` and ``index_add``."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        weights, ids = self.route(x)
        flat_ids, flat_weights = ids.reshape(-1), weights.reshape(-1)
        out = torch.zeros_like(x)
        for e, layer in enumerate(self.experts):
            (slots,) = torch.nonzero(flat_ids == e, as_tuple=True)
            tokens = torch.div(slots, self.top_k, rounding_mode="floor")
            result = layer(torch.index_select(x, 0, tokens))
            result = result * torch.index_select(flat_weights, 0, slots).unsqueeze(-1)
            out = out.index_add(0, tokens, result)
        return out.reshape(shape)


class AccumulateLoop(Loop):
    """``nonzero`` as a matrix, ``index_put_`` that accumulates."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = x.new_zeros(x.shape)
        for e, layer in enumerate(self.experts):
            where = (ids == e).nonzero()
            token, slot = where[:, 0], where[:, 1]
            out.index_put_((token,), layer(x[token]) * weights[token, slot].unsqueeze(1), accumulate=True)
        return out


class SplitLoop(Loop):
    """DeepSeek's inference path without the ``if``: sort, split by counts on the host, concatenate, unsort."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        counts = ids.new_zeros((ids.shape[0], self.num_experts))
        counts.scatter_(1, ids, 1)
        sizes = counts.sum(dim=0).tolist()
        order = ids.view(-1).argsort()
        rows = x[order // ids.shape[1]]
        results = [layer(part) for layer, part in zip(self.experts, rows.split(sizes), strict=True)]
        outs = torch.cat(results, dim=0)
        unsorted = torch.empty_like(outs)
        unsorted[order] = outs
        final = unsorted.view(*ids.shape, -1).type(weights.dtype).mul_(weights.unsqueeze(dim=-1)).sum(dim=1)
        return final.type(outs.dtype)


class StackedLoop(Block):
    """transformers 5.x eager without the search for experts that are hit: weights of expert e are ``w[e]``."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int,
        activation: str = "silu", bias: bool = False, router: str = "renorm",
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        packed = 2 * width if activation in GATED else width
        self.gate_up_proj, self.down_proj = parameter(experts, packed, hidden), parameter(experts, hidden, width)
        self.gate_up_bias = parameter(experts, packed, scale=0.5) if bias else None
        self.down_bias = parameter(experts, hidden, scale=0.5) if bias else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        shape = hidden_states.shape
        flat = hidden_states.reshape(-1, shape[-1])
        weights, ids = self.route(flat)
        final = torch.zeros_like(flat)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for e in range(self.num_experts):
            slot, token = torch.where(mask[e])
            z = F.linear(flat[token], self.gate_up_proj[e], None if self.gate_up_bias is None else self.gate_up_bias[e])
            h = PLAIN[self.activation](z) if self.activation in PLAIN else GATED[self.activation](*z.chunk(2, dim=-1))
            y = F.linear(h, self.down_proj[e], None if self.down_bias is None else self.down_bias[e])
            final.index_add_(0, token, (y * weights[token, slot, None]).to(final.dtype))
        return final.reshape(shape)

    def expert(self, e: int) -> Expert:
        if self.activation in PLAIN:
            return stacked_expert(e, None, self.gate_up_proj, self.down_proj, False,
                                  (None, self.gate_up_bias, self.down_bias))  # fmt: skip
        gate, up = self.gate_up_proj.chunk(2, dim=1)
        biases = (None, None) if self.gate_up_bias is None else self.gate_up_bias.chunk(2, dim=1)
        return stacked_expert(e, gate, up, self.down_proj, False, (*biases, self.down_bias))


class JetMoeSplit(Block):
    """JetMoE's parallel experts: gates and rows sorted by expert, split, one linear a part, ``index_add``."""

    def __init__(
        self, hidden: int, width: int, experts: int, top_k: int,
        activation: str = "silu", bias: bool = False, router: str = "topk_softmax",
    ) -> None:  # fmt: skip
        super().__init__(hidden, width, experts, top_k, activation, router)
        self.input_linear, self.output_linear = parameter(experts, 2 * width, hidden), parameter(experts, hidden, width)
        self.bias = parameter(hidden, scale=0.5) if bias else None

    def forward(self, layer_input: Tensor) -> Tensor:
        batch, length, hidden = layer_input.size()
        layer_input = layer_input.reshape(-1, hidden)
        gates, ids = self.route(layer_input)
        zeros = torch.zeros([ids.size(0), self.num_experts], dtype=gates.dtype, device=gates.device)
        sizes = zeros.scatter(1, ids, 1).long().sum(0).tolist()
        _, order = ids.flatten().sort(0)
        batch_index = order.div(self.top_k, rounding_mode="trunc")
        batch_gates = gates.flatten()[order]
        hidden_states = self.parallel(self.input_linear, layer_input[batch_index], sizes)
        halves = hidden_states.chunk(2, dim=-1)
        outputs = self.parallel(self.output_linear, GATED[self.activation](*halves), sizes)
        outputs = outputs * batch_gates[:, None]
        out = torch.zeros((batch * length, hidden), dtype=outputs.dtype, device=outputs.device)
        out = out.index_add(0, batch_index, outputs).view(batch, length, hidden)
        return out if self.bias is None else out + self.bias

    def parallel(self, weight: Tensor, rows: Tensor, sizes: list[int]) -> Tensor:
        parts = rows.split(sizes, dim=0)
        return torch.cat([F.linear(parts[e], weight[e]) for e in range(self.num_experts)], dim=0)

    def expert(self, e: int) -> Expert:
        gate, up = self.input_linear.chunk(2, dim=1)
        return stacked_expert(e, gate, up, self.output_linear, False)

    def shared_part(self, x_TH: Tensor) -> Tensor:
        return torch.zeros_like(x_TH) if self.bias is None else self.bias.expand_as(x_TH)
