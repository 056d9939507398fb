"""The blocks that are measured, and the patterns that their experts are pruned to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from samoyeds_compile import PackedTensor, SparsityConfig, densify_, sparsify_


@dataclass(frozen=True)
class Shape:
    """A block of transformers and its sizes."""

    title: str
    build: type[nn.Module]
    config: Any


SHAPES = {
    "mixtral": Shape("Mixtral-like E8 k2 1024x3584", MixtralSparseMoeBlock, MixtralConfig(
        hidden_size=1024, intermediate_size=3584, num_local_experts=8)),
    "qwen3": Shape("Qwen3-like E64 k8 1024x768", Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(
        hidden_size=1024, moe_intermediate_size=768, num_experts=64, num_experts_per_tok=8)),
    "qwen2": Shape("Qwen2-MoE-like E60 k4 2048x1408 +shared 5632", Qwen2MoeSparseMoeBlock, Qwen2MoeConfig(
        hidden_size=2048, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
        num_experts_per_tok=4)),
    "deepseek": Shape("DeepSeek-V2-Lite-like E64 k6 2048x1408 +shared 2816", DeepseekV2Moe, DeepseekV2Config(
        hidden_size=2048, moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2)),
}  # fmt: skip
DENSE = "dense"
PATTERNS = {
    "2:4": SparsityConfig(1, 1, 32),
    "1:2:32": SparsityConfig(1, 2, 32),
    "1:2:128": SparsityConfig(1, 2, 128),
    "1:2:32/16": SparsityConfig(1, 2, 32, group=16),
}
"""What else ``--patterns`` offers beside ``dense``."""
TOKENS = (1, 4, 16, 64, 256, 1024)


@dataclass
class Blocks:
    """One block with the weights of each pattern.

    Attributes:
        dense: what the dense arms run. It has the weights of the first pattern, zeros included, so that these compute
            the same function as one sparse arm. No arm's time depends on the values of weights.
        sparse: packed experts, by pattern.
    """

    dense: nn.Module
    sparse: dict[str, nn.Module]


def build(shape: Shape, dtype: torch.dtype, patterns: Sequence[str]) -> Blocks:
    """Random weights, pruned by magnitude; the router, and so the routing, is the same everywhere."""
    shape.config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    block = shape.build(shape.config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    block = block.to(dtype).eval().requires_grad_(False)
    sparse = {name: pruned(block, PATTERNS[name]) for name in patterns if name != DENSE}
    return Blocks(densified(next(iter(sparse.values()))) if sparse else block, sparse)


def pruned(block: nn.Module, config: SparsityConfig) -> nn.Module:
    """A copy with packed experts."""
    copied = copy.deepcopy(block)
    sparsify_(copied, config, method="magnitude", progress=False)
    return copied


def densified(block: nn.Module) -> nn.Module:
    """A copy with the same weights, dense."""
    copied = copy.deepcopy(block)
    densify_(copied)
    return copied.requires_grad_(False)


def references(blocks: Blocks, inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What eager gives for each input, by pattern: with a pattern's own weights, dense."""
    found = {}
    for name in (DENSE, *blocks.sparse):
        same = name == DENSE or name == next(iter(blocks.sparse))
        block = blocks.dense if same else densified(blocks.sparse[name])
        found[name] = [block(x) for x in inputs]
    return found


def shared_expert(block: nn.Module) -> nn.Module | None:
    """The MLP that every token takes."""
    return next((child for name, child in block.named_children() if name in ("shared_expert", "shared_experts")), None)


@dataclass(frozen=True)
class Sizes:
    """What a call reads and computes.

    Attributes:
        bytes: of the weights of all experts that have tokens, of the shared expert and router, of rows in and out.
        flops: of the products with kept weights; two for a multiplication and its addition.
        dense_flops: of the same products with dense weights.
    """

    bytes: int
    flops: int
    dense_flops: int


def sizes(block: nn.Module, ids_TK: Tensor, x: Tensor, density: float = 1.0) -> Sizes:
    """The sizes of one call in which tokens are routed to ``ids_TK``."""
    weights = list(block.experts.parameters())
    experts = len(weights[0])
    stored = sum(w.packed_nbytes if isinstance(w, PackedTensor) else w.nbytes for w in weights) // experts
    elements = sum(w[0].numel() for w in weights)
    others = [p for name, p in block.named_parameters() if not name.startswith("experts.")]
    read = stored * len(ids_TK.unique()) + sum(p.nbytes for p in others) + 2 * x.nbytes
    tokens = x.numel() // x.shape[-1]
    common = 2 * tokens * sum(p.numel() for p in others if p.dim() == 2)
    routed = 2 * ids_TK.numel() * elements
    return Sizes(read, int(routed * density) + common, routed + common)


def routing(block: nn.Module, x: Tensor) -> Tensor:
    """The experts that the router of a block chooses, [T, K]."""
    chosen: list[Tensor] = []
    hook = block.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1].clone()))
    block(x)
    hook.remove()
    return chosen[0]
