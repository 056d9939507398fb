"""Three families of transformers, small enough to train for 200 steps in a test, and their training loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 128
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "use_cache": False,
}  # fmt: skip
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(intermediate_size=48, num_local_experts=4, **COMMON)),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(moe_intermediate_size=16, num_experts=8, head_dim=8, norm_topk_prob=True, **COMMON),
    ),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(intermediate_size=16, num_experts=8, pad_token_id=0, **COMMON)),
}


def build(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model in train mode; the same weights each time."""
    torch.manual_seed(0)
    model, config = FAMILIES[family]
    return model(config).to(dtype).train()


def batch(step: int) -> Tensor:
    """Token ids [4, 24]: counting with a stride of the sequence's own, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (
        torch.randint(VOCABULARY, (4, 1), generator=generator),
        torch.randint(1, 6, (4, 1), generator=generator),
    )
    return (start + stride * torch.arange(24)) % VOCABULARY


def train(model: PreTrainedModel, forward: Callable[..., Any], steps: int) -> Tensor:
    """Losses [steps], float32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        ids = batch(step)
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses)
