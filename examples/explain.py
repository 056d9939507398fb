"""What the backend finds in a model, what it makes of it, and why it leaves something alone.

    python examples/explain.py

`samoyeds_compile.explain` runs the model once and returns a `Report`. The same small Mixtral is explained twice: as
transformers builds it, and with its experts run as a Python loop, which no graph can hold.
"""

from __future__ import annotations

import sys
import warnings

import torch
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM

import samoyeds_compile
from samoyeds_compile import Report

CONFIG = MixtralConfig(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
)  # fmt: skip


def explain_with(experts_implementation: str) -> Report:
    """The report on a small Mixtral whose experts run in the way named."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(CONFIG).eval()
    model.set_experts_implementation(experts_implementation)
    inputs = {"input_ids": torch.randint(CONFIG.vocab_size, (1, 32)), "use_cache": False}
    with torch.no_grad():
        return samoyeds_compile.explain(model, **inputs)


def main() -> int:
    """Explain both; 0 if one was rewritten as a whole and the other not at all."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    console = Console(width=None if sys.stdout.isatty() else 140)

    console.rule("experts as transformers runs them by default: grouped_mm")
    grouped = explain_with("grouped_mm")
    console.print(grouped)

    console.rule("experts as a Python loop: eager")
    looped = explain_with("eager")
    console.print(looped)

    console.rule("the same as data")
    for block in looped.blocks:
        console.print(f"{block.module}: rewritten={block.rewritten}, reason={block.reason!r}")
    return int(len(grouped.rewritten) != 2 or bool(looped.rewritten))


if __name__ == "__main__":
    sys.exit(main())
