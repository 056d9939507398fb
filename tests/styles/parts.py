"""What the blocks of the zoo share: the base class with a canonical picture of the experts, routers, activations.

The forward passes use none of this beyond the router, the activation and the parameters, so that each style stays
written out as its project writes it. `Block.assignments` and `Block.expert` say, independently of the forward pass,
what the block computes; `tests/styles/reference.py` computes it token by token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Assignment = tuple[int, int, Tensor]
"""Token, expert, routing weight (a scalar tensor)."""


class Expert(NamedTuple):
    """One expert in canonical form: gate [I, H] or None, up [I, H], down [H, I], biases or None."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def silu_glu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gelu_glu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def clamped_glu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(min=None, max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"silu": silu_glu, "gelu": gelu_glu, "clamped": clamped_glu}
"""Activations of gate and up."""
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "relu2": relu_squared, "plain_gelu": F.gelu}
"""Activations of experts without a gate."""
ACTIVATIONS = (*GATED, *PLAIN)
ROUTERS = ("softmax", "renorm", "topk_softmax", "sigmoid_bias", "argmax")


class Block(nn.Module):
    """A router and experts. Sizes are attributes; subclasses add parameters and the forward pass.

    Attributes:
        weight_before: the routing weight multiplies the expert's input instead of its output.
    """

    weight_before = False
    gate: nn.Module

    def __init__(self, hidden: int, width: int, experts: int, top_k: int, activation: str, router: str) -> None:
        super().__init__()
        self.hidden, self.width, self.num_experts, self.top_k = hidden, width, experts, top_k
        self.activation, self.router = activation, router
        self.gate = nn.Linear(hidden, experts, bias=False)
        if router == "sigmoid_bias":
            self.register_buffer("choice_bias", torch.linspace(-0.2, 0.2, experts))

    def route(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Routing weights and expert ids, both [T, K]."""
        return route(self, self.gate(x_TH))

    def assignments(self, x: Tensor) -> list[Assignment]:
        """Which experts each token meets, and with which weight; tokens are counted over all leading dimensions."""
        weights, ids = self.route(x.reshape(-1, self.hidden))
        return [(t, int(e), weights[t, k]) for t, row in enumerate(ids) for k, e in enumerate(row)]

    def expert(self, e: int) -> Expert:
        """The parameters of one expert."""
        raise NotImplementedError

    def shared_part(self, x_TH: Tensor) -> Tensor:
        """What is added besides the routed experts."""
        return torch.zeros_like(x_TH)


def route(block: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The routers that projects put in front of experts, by name."""
    kind, k = block.router, block.top_k
    if kind in ("softmax", "renorm"):
        weights, ids = torch.topk(F.softmax(logits, dim=-1, dtype=torch.float), k, dim=-1)
        if kind == "renorm":
            weights /= weights.sum(dim=-1, keepdim=True)
    elif kind == "topk_softmax":
        values, ids = torch.topk(logits, k, dim=-1)
        weights = F.softmax(values, dim=-1, dtype=torch.float)
    elif kind == "sigmoid_bias":
        scores = logits.float().sigmoid()
        _, ids = torch.topk(scores + block.choice_bias, k, dim=-1, sorted=False)
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5
    else:
        scores = F.softmax(logits, dim=-1, dtype=torch.float)
        weights, ids = torch.max(scores, dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


class Mlp(nn.Module):
    """An expert of its own: three linears, or two if the activation takes no gate."""

    def __init__(self, hidden: int, width: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, width, bias=bias)
        self.w2 = nn.Linear(width, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias) if activation in GATED else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.w3 is None:
            return self.w2(PLAIN[self.activation](self.w1(x)))
        return self.w2(GATED[self.activation](self.w1(x), self.w3(x)))

    def canonical(self) -> Expert:
        first, second, third = self.w1, self.w2, self.w3
        if third is None:
            return Expert(None, first.weight, second.weight, None, first.bias, second.bias)
        return Expert(first.weight, third.weight, second.weight, first.bias, third.bias, second.bias)


class PackedMlp(nn.Module):
    """An expert whose gate and up are one linear, cut into halves."""

    def __init__(self, hidden: int, width: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(GATED[self.activation](gate, up))

    def canonical(self) -> Expert:
        gate, up = self.gate_up_proj.weight.chunk(2)
        biases = (None, None) if self.gate_up_proj.bias is None else self.gate_up_proj.bias.chunk(2)
        return Expert(gate, up, self.down_proj.weight, *biases, self.down_proj.bias)


def parameter(*shape: int, scale: float | None = None) -> nn.Parameter:
    """Random values of a size that keeps activations near one."""
    return nn.Parameter(torch.randn(*shape) * (shape[-1] ** -0.5 if scale is None else scale))


def stacked_expert(
    e: int, gate: Tensor | None, up: Tensor, down: Tensor, in_out: bool, biases: Sequence[Tensor | None] = ()
) -> Expert:
    """Expert ``e`` of stacks [E, out, in], or [E, in, out] if ``in_out``."""
    weights = [None if w is None else w[e].t() if in_out else w[e] for w in (gate, up, down)]
    return Expert(*weights, *(None if b is None else b[e] for b in biases))  # type: ignore[arg-type]
