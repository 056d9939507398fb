"""Train a small mixture-of-experts model with and without Samoyeds, losses side by side.

    python examples/train.py [--steps N] [--base inductor|aot_eager|eager]

An ordinary training loop; the only difference between the two runs is ``torch.compile(model, backend="samoyeds")``. The
text is the source of Python's own argparse, read byte by byte. The exit status is 1 if the losses part.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from samoyeds_compile import Report

BATCH, LENGTH = 8, 64
TOLERANCE = 1e-3
"""Largest relative difference of two losses of the same step; rounding alone grows as training goes on."""

CONFIG = Qwen3MoeConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=16, num_experts_per_tok=4, moe_intermediate_size=48, norm_topk_prob=True, use_cache=False,
)  # fmt: skip


def batches(steps: int) -> list[Tensor]:
    """Random cuts of the text, the same in every run."""
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    starts = torch.randint(len(text) - LENGTH, (steps, BATCH), generator=torch.Generator().manual_seed(0))
    return [torch.stack([text[start : start + LENGTH] for start in row]) for row in starts.tolist()]


def train(prepare: Callable[[torch.nn.Module], Callable[..., Any]], steps: int) -> tuple[list[float], float]:
    """Losses of a fresh model, and the seconds that its training took.

    Args:
        prepare: makes of the model what is called in the loop.
        steps: how many updates.
    """
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(CONFIG).train()
    forward = prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, began = [], time.perf_counter()
    for tokens in batches(steps):
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, time.perf_counter() - began


def side_by_side(eager: list[float], compiled: list[float]) -> Table:
    """Some of the losses as a table."""
    table = Table("step", "eager", "samoyeds", "relative difference")
    for step in range(0, len(eager), max(1, len(eager) // 10)):
        ours, theirs = compiled[step], eager[step]
        table.add_row(str(step), f"{theirs:.5f}", f"{ours:.5f}", f"{abs(ours - theirs) / theirs:.1e}")
    return table


def main() -> int:
    """Train twice and compare; 0 if the losses stay together and every block was rewritten."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--base", choices=["inductor", "aot_eager", "eager"], default="inductor")
    args, console, report = parser.parse_args(), Console(), Report()
    torch.set_num_threads(1)  # the model is too small to share
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")

    options = {"base": args.base, "report": report}
    with console.status("training in eager mode"):
        eager, eager_seconds = train(lambda model: model, args.steps)
    with console.status("training with samoyeds, compiling first"):
        compiled, seconds = train(lambda m: torch.compile(m, backend="samoyeds", options=options), args.steps)

    console.print(side_by_side(eager, compiled))
    largest = max(abs(a - b) / b for a, b in zip(compiled, eager, strict=True))
    done, found = len(report.rewritten), len(report.blocks)
    console.print(f"{done} of {found} MoE blocks rewritten; losses differ by at most {largest:.1e} of their value")
    console.print(f"eager {eager_seconds:.1f} s, samoyeds {seconds:.1f} s with compilation")
    return int(largest > TOLERANCE or done < found or found == 0)


if __name__ == "__main__":
    sys.exit(main())
