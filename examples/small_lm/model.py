"""The model: a Mixtral of transformers with 2.7 million parameters, 8 experts in each of 3 layers, 2 for each token."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

FOLDER = Path(__file__).parent
VOCABULARY = 1024
CONTEXT = 256
SPARSE = FOLDER / "sparse75.safetensors"


def build() -> MixtralForCausalLM:
    """An untrained model, float32."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_local_experts=8,
        num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
        max_position_embeddings=2 * CONTEXT, router_aux_loss_coef=0.02, bos_token_id=0, eos_token_id=0,
        pad_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def load(dtype: torch.dtype = torch.float32) -> MixtralForCausalLM:
    """The trained model, in eval mode."""
    model = build()
    model.load_state_dict(load_file(FOLDER / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.to(dtype).eval()


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as bfloat16; the output layer is the embedding and is left out."""
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, path, metadata={"format": "pt", "made_by": "python -m examples.small_lm.train --seed 0"})


def tokenizer() -> Tokenizer:
    """The tokenizer that the trained model was trained with."""
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def losses(model: nn.Module, windows_NS: Tensor, batch: int = 16) -> Tensor:
    """Cross entropy in nats of each predicted token, [N, S - 1] float32."""
    found = []
    with torch.inference_mode():
        for ids in windows_NS.split(batch):
            logits = model(input_ids=ids).logits[:, :-1].float()
            found.append(
                F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
            )
    return torch.cat(found)


def perplexity(model: nn.Module, windows_NS: Tensor) -> float:
    """exp of the mean cross entropy for a token."""
    return float(losses(model, windows_NS).mean().exp())


def continuation(model: MixtralForCausalLM, prompt: str, tokens: int = 40) -> str:
    """What the model writes after a prompt, the likeliest token each time."""
    text = tokenizer()
    ids = torch.tensor([text.encode(prompt).ids])
    written = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(text.decode(written[0, ids.shape[1] :].tolist()))
