"""What a block computes, token by token in float64: plain loops, formulas written out, no code of the blocks."""

import copy
import math

import torch
from torch import Tensor

from tests.styles.capacity import SoftMoE
from tests.styles.parts import Block, Expert


def activate(name: str, gate: Tensor | None, up: Tensor) -> Tensor:
    """The activation by its formula."""
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    if name == "gelu":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    if name == "clamped":
        seven = torch.tensor(7.0, dtype=up.dtype)
        gate, up = torch.minimum(gate, seven), torch.minimum(torch.maximum(up, -seven), seven)
        return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    if name == "relu":
        return torch.where(up > 0, up, 0.0)
    if name == "relu2":
        return torch.where(up > 0, up * up, 0.0)
    assert name == "plain_gelu"
    return 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))


def linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product = weight.detach().double().mv(x)
    return product if bias is None else product + bias.detach().double()


def run_expert(expert: Expert, activation: str, x_H: Tensor) -> Tensor:
    """One expert on one token, float64."""
    gate = None if expert.gate is None else linear(expert.gate, expert.gate_bias, x_H)
    up = linear(expert.up, expert.up_bias, x_H)
    return linear(expert.down, expert.down_bias, activate(activation, gate, up))


@torch.no_grad()
def reference(block: Block, x: Tensor) -> Tensor:
    """The output of a block, in float64 and the shape of ``x``; the router's choices are the block's own."""
    if isinstance(block, SoftMoE):
        return soft_slots(block, x)
    rows_TH = x.reshape(-1, x.shape[-1])
    out_TH = copy.deepcopy(block).double().shared_part(rows_TH.double()).clone()
    for token, e, weight in block.assignments(x):
        row, w = rows_TH[token].double(), weight.double()
        if block.weight_before:
            out_TH[token] += run_expert(block.expert(e), block.activation, row * w)
        else:
            out_TH[token] += w * run_expert(block.expert(e), block.activation, row)
    return out_TH.reshape(x.shape)


def soft_slots(block: SoftMoE, x: Tensor) -> Tensor:
    """Every slot is a mixture of all tokens, every token a mixture of all slots."""
    phi = block.phi.detach().double()
    out = torch.zeros_like(x, dtype=torch.float64)
    for rows, result in zip(x.double(), out, strict=True):
        logits = torch.stack([torch.stack([row @ phi[:, e] for e in range(block.num_experts)]) for row in rows])
        into, back = logits.softmax(0), logits.flatten(1).softmax(1).view(logits.shape)
        for e in range(block.num_experts):
            for slot in range(logits.shape[2]):
                mixed = sum(into[t, e, slot] * row for t, row in enumerate(rows))
                y = run_expert(block.expert(e), block.activation, mixed)
                for t in range(len(rows)):
                    result[t] += back[t, e, slot] * y
    return out
