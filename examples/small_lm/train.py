"""Train the small model: tokenizer, then some passes over the text, until the loss on held-out text is flat.

    python -m examples.small_lm.train [--seed 0] [--steps 2000] [--every 1] [--out FOLDER]

Twenty minutes on one core. Writes model.safetensors, tokenizer.json and training.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from . import model as small
from .corpus import held_out, tokens, training, windows

BATCH = 16
RATE = 3e-3
WARMUP = 100
EVERY = 100
"""Steps from one look at held-out text to the next."""


def trained_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE; token 0 separates files."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=small.VOCABULARY, special_tokens=["<|file|>"], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    return found


def batches(stream: Tensor, steps: int, seed: int) -> list[Tensor]:
    """Random windows of the text, a batch for each step."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream) - small.CONTEXT, (steps, BATCH), generator=generator)
    return [torch.stack([stream[start : start + small.CONTEXT] for start in row]) for row in starts.tolist()]


def groups(model: nn.Module, decay: float = 0.1) -> list[dict[str, object]]:
    """Parameters for AdamW; norms do not decay."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the highest learning rate: up linearly, down as a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


def train(seed: int, steps: int, stream: Tensor, unseen: Tensor) -> tuple[nn.Module, list[tuple[int, float]]]:
    """A trained model, and (step, perplexity on held-out text) along the way."""
    torch.manual_seed(seed)
    model = small.build().train()
    optimizer = torch.optim.AdamW(groups(model), lr=RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps, WARMUP))
    curve: list[tuple[int, float]] = []
    for step, ids in enumerate(batches(stream, steps, seed), 1):
        model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVERY == 0 or step == steps:
            curve.append((step, round(small.perplexity(model.eval(), unseen), 4)))
            model.train()
            print(f"seed {seed} step {step}: perplexity {curve[-1][1]}", flush=True)
    return model.eval(), curve


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=1, help="read only each so many-th text")
    parser.add_argument("--out", type=Path, default=small.FOLDER)
    options = parser.parse_args()
    start = time.time()
    text = training()[:: options.every]
    tokenizer = trained_tokenizer(text)
    stream, unseen = tokens(text, tokenizer), windows(tokens(held_out(), tokenizer), small.CONTEXT, 64)
    print(f"{len(stream):,} tokens to train on; {sum(map(len, text)):,} characters", flush=True)
    model, curve = train(options.seed, options.steps, stream, unseen)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.out / "tokenizer.json"))
    small.save(model, options.out / "model.safetensors")
    facts = {"seed": options.seed, "steps": options.steps, "tokens_read": options.steps * BATCH * small.CONTEXT}
    facts |= {"training_tokens": len(stream), "minutes": round((time.time() - start) / 60, 1), "perplexity": curve}  # type: ignore[dict-item]
    (options.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
