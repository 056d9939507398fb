"""One MoE block of transformers: eager, Inductor and Samoyeds, by shape, dtype, implementation and number of tokens.

    python -m benchmarks.block [--quick]

Equal work: the same module, router included, the same inputs, outputs compared. Every arm is the unmodified module;
``inductor`` and ``samoyeds`` differ in the backend only. Prints milliseconds and the ratio inductor / samoyeds.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.common import DTYPES, alternate, machine, medians, save

console = Console()
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A block with the proportions of a published model, H reduced to fit a small machine."""

    name: str
    build: type[nn.Module]
    config: object


SHAPES = (
    Shape("mixtral E8 k2 H1024 I3584", MixtralSparseMoeBlock,
          MixtralConfig(hidden_size=1024, intermediate_size=3584, num_local_experts=8)),
    Shape("qwen3 E64 k8 H1024 I768", Qwen3MoeSparseMoeBlock,
          Qwen3MoeConfig(hidden_size=1024, moe_intermediate_size=768, num_experts=64, num_experts_per_tok=8)),
    Shape("deepseek-v3 E64 k8 H896 I256 +shared", DeepseekV3MoE,
          DeepseekV3Config(hidden_size=896, moe_intermediate_size=256, n_routed_experts=64, num_experts_per_tok=8,
                           n_group=8, topk_group=4, num_local_experts=64)),
)  # fmt: skip
TOKENS = {"grouped_mm": (1, 4, 16, 64, 256, 1024), "batched_mm": (1, 4, 16)}


def make(shape: Shape, dtype: torch.dtype, implementation: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    shape.config._experts_implementation = implementation
    block = shape.build(shape.config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block.to(device=device, dtype=dtype).eval()


def cases(implementations: Sequence[str]) -> list[tuple[Shape, str, str]]:
    return [(shape, dtype, i) for i in implementations for shape in SHAPES for dtype in ("bf16", "fp32")]


def measure(shape: Shape, dtype: str, implementation: str, tokens: Sequence[int], device: str) -> Iterator[Row]:
    """All token counts of one block. Gathered blocks are compiled for each count, as decoding does; others once."""
    torch._dynamo.reset()
    block = make(shape, DTYPES[dtype], implementation, device)
    dynamic = implementation == "grouped_mm"
    arms = {
        "eager": block,
        "inductor": torch.compile(block, backend="inductor", dynamic=dynamic),
        "samoyeds": torch.compile(block, backend="samoyeds", dynamic=dynamic),
    }
    for count in tokens:
        x = torch.randn(1, count, shape.config.hidden_size, device=device).to(DTYPES[dtype])
        row = {"shape": shape.name, "dtype": dtype, "implementation": implementation, "tokens": count}
        with torch.no_grad():
            yield row | compare(arms, x)


def compare(arms: dict[str, nn.Module], x: torch.Tensor) -> Row:
    expected = arms["eager"](x)
    scale = expected.abs().max()
    deviation = {name: float((arms[name](x) - expected).abs().max() / scale) for name in ("inductor", "samoyeds")}
    times = medians(alternate({name: partial(arm, x) for name, arm in arms.items()}))
    ratios = {f"{peer}/samoyeds": round(times[peer] / times["samoyeds"], 3) for peer in ("inductor", "eager")}
    return {"ms": times, **ratios, "deviation": deviation}


def show(rows: list[Row]) -> None:
    columns = ("shape", "dtype", "implementation", "tokens", "eager", "inductor", "samoyeds", "inductor/samoyeds")
    table = Table(title="One MoE block, milliseconds (median of alternating rounds)")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = {**row, **{name: f"{ms:.3f}" for name, ms in row["ms"].items()}}
        table.add_row(*(str(cells[column]) for column in columns))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every third number of tokens")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--implementation", choices=list(TOKENS), help="only this one (default: all)")
    parser.add_argument("--name", default="block", help="name of the results file")
    options = parser.parse_args()
    where, rows = machine(), []
    chosen = [options.implementation] if options.implementation else list(TOKENS)
    for shape, dtype, implementation in track(cases(chosen), "blocks", console=console):
        tokens = TOKENS[implementation][:: 3 if options.quick else 1]
        rows += measure(shape, dtype, implementation, tokens, options.device)
    show(rows)
    console.print("saved to", save(options.name, rows, where))


if __name__ == "__main__":
    main()
