"""Models with experts for the tests of pruning: tiny transformers families, and experts in a list."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.jetmoe import modeling_jetmoe

from tests.models import families

CLASSES = {entry.id: entry for entry in families.decorated_experts_classes() + families.undecorated()}
STACKED = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "nemotron_h")
"""Nemotron-H has no gate; GPT-OSS is transposed, alternates gate and up, and has biases."""
OTHER_STACKS = ("dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7")
"""Not decorated, and each stored in a way of its own."""


@functools.cache
def _built(name: str) -> nn.Module:
    return families.build(CLASSES[name])


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    model = copy.deepcopy(_built(name)).to(dtype)
    return model, families.inputs(CLASSES[name], model, batch=4, seq=32)


def experts_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that run experts; jetmoe's hold two modules with stacks."""
    experts = modeling_jetmoe.JetMoeMoE if name == "jetmoe" else CLASSES[name].load()
    return [module for module in model.modules() if isinstance(module, experts)]


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return families.logits_of(model(**inputs))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    hooks = [m for m in model.modules() if m._forward_pre_hooks]
    same = all(type(after[name]) is Tensor and after[name].equal(value) for name, value in before.items())
    return not hooks and after.keys() == before.keys() and same


class Expert(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def between(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.between(x))


class Mixing(Expert):
    """An expert that does not treat its features alike."""

    def between(self, x: Tensor) -> Tensor:
        return super().between(x).cumsum(-1)


class ListedModel(nn.Module):
    """A router over a list of experts, with a shared expert and a list that is no expert."""

    def __init__(
        self, width: int = 16, inner: int = 32, experts: int = 4, bias: bool = True, kind: type[Expert] = Expert
    ) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(kind(width, inner, bias) for _ in range(experts))
        self.shared_experts = nn.ModuleList(kind(width, inner, bias) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        out = sum(expert(x) for expert in self.shared_experts)
        for e, expert in enumerate(self.experts):
            tokens, slots = torch.where(ids == e)
            if len(tokens):
                out = out.index_add(0, tokens, expert(x[tokens]) * weights[tokens, slots, None])
        return self.layers[1](self.layers[0](x)) + out
