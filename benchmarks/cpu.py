"""Sparse experts on a CPU: the whole block through ``torch.compile`` against Inductor, and against bare products.

    python -m benchmarks.cpu [--quick] [--threads 1 2] [--json FILE]

Arms of one row, taken in turns, A B C C B A, with the last-level cache flushed before each call:

- ``samoyeds``: the unmodified block of transformers, its experts sparse (``sparsify_``), router included.
- ``inductor``: the same block with the same pruned weights, dense.
- ``mm``: ``torch.mm`` for each expert that has tokens, three products, dense, and nothing else: no router, gather,
  activation or sum. What a library of dense products could give at most if it repacked weights in each call, as
  PyTorch does.

Outputs are compared. With one thread, times are CPU times of the thread, which neighbours on the machine disturb less;
with several, wall-clock times. Ratios are medians over rounds of the ratio in a round, so slow rounds count once.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.common import DTYPES, RESULTS, machine
from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_compile import Report, SparsityConfig, densify_, sparsify_

console = Console()
Row = dict[str, Any]
SHAPES: dict[str, tuple[type[nn.Module], Any]] = {
    "mixtral E8 k2 H1024 I3584": (
        MixtralSparseMoeBlock,
        MixtralConfig(hidden_size=1024, intermediate_size=3584, num_local_experts=8),
    ),
    "qwen3 E64 k8 H1024 I768": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(hidden_size=1024, moe_intermediate_size=768, num_experts=64, num_experts_per_tok=8),
    ),
    "qwen2 E60 k4 H2048 I1408 +shared": (
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(hidden_size=2048, moe_intermediate_size=1408, shared_expert_intermediate_size=5632),
    ),
}
CONFIGS = {
    "1:2:32": SparsityConfig(1, 2, 32),
    "1:2:128": SparsityConfig(1, 2, 128),
    "2:4": SparsityConfig(1, 1, 32),
}
TOKENS = (1, 4, 16, 64, 256, 1024)
FLUSHED = torch.empty(64 << 20)
"""Read before each call: 256 MiB, as other layers would be."""


def make(shape: str, dtype: torch.dtype, config: SparsityConfig) -> tuple[nn.Module, nn.Module]:
    """The block with packed experts, and with the same weights dense."""
    build, settings = SHAPES[shape]
    settings._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    block = build(settings)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    block = block.to(dtype).eval()
    sparsify_(block, config, method="magnitude", progress=False)
    dense = copy.deepcopy(block)
    densify_(dense)
    return block, dense.requires_grad_(False)


def products(dense: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """The ``mm`` arm for the experts that the block chooses."""
    chosen: list[torch.Tensor] = []
    hook = dense.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone()))
    dense(x)
    hook.remove()
    rows = x.flatten(0, -2)
    up, down = dense.experts.gate_up_proj, dense.experts.down_proj
    width = down.shape[2]
    taken = [(e, rows[(chosen[0] == e).any(-1)]) for e in chosen[0].unique().tolist()]
    h = [torch.randn(len(r), width).to(x.dtype) for _, r in taken]

    def run() -> None:
        for (e, r), h_e in zip(taken, h, strict=True):
            torch.mm(r, up[e].t())
            torch.mm(h_e, down[e].t())

    return run


def timed(arm: Callable[[], Any], threads: int) -> float:
    """Milliseconds."""
    FLUSHED.sum()
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    arm()
    return (clock() - start) * 1e3


def rounds_of(arms: dict[str, Callable[[], Any]], threads: int, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each arm, round by round; the order alternates."""
    for arm in arms.values():
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    end, number = time.perf_counter() + seconds, 0
    while number < 5 or (time.perf_counter() < end and number < 40):
        for name in list(arms) if number % 2 == 0 else reversed(arms):
            times[name].append(timed(arms[name], threads))
        number += 1
    return times


@torch.no_grad()
def measure(shape: str, name: str, dtype: str, tokens: tuple[int, ...], threads: int, seconds: float) -> Iterator[Row]:
    torch._dynamo.reset()
    torch.set_num_threads(threads)
    sparse, dense = make(shape, DTYPES[dtype], CONFIGS[name])
    report = Report()
    fast = torch.compile(sparse, backend="samoyeds", dynamic=True, options={"report": report})
    inductor = torch.compile(dense, backend="inductor", dynamic=True)
    for count in tokens:
        x = torch.randn(1, count, SHAPES[shape][1].hidden_size).to(DTYPES[dtype])
        arms = {"samoyeds": lambda x=x: fast(x), "inductor": lambda x=x: inductor(x), "mm": products(dense, x)}
        mine, theirs = fast(x), inductor(x)
        deviation = float((mine - theirs).abs().max() / theirs.abs().max())
        times = rounds_of(arms, threads, seconds)
        ratios = {
            f"{peer}/samoyeds": statistics.median(p / s for p, s in zip(times[peer], times["samoyeds"], strict=True))
            for peer in ("inductor", "mm")
        }
        yield {
            "shape": shape, "config": name, "dtype": dtype, "threads": threads, "tokens": count,
            "ms": {arm: round(statistics.median(values), 3) for arm, values in times.items()},
            "ms_least": {arm: round(min(values), 3) for arm, values in times.items()},
            **{key: round(value, 2) for key, value in ratios.items()},
            "rounds": len(times["samoyeds"]), "deviation": float(f"{deviation:.1e}"),
            "kernel": next((k for g in report.graphs for k in g.kernels), "none"),
        }  # fmt: skip


def show(rows: list[Row]) -> None:
    columns = ("shape", "config", "dtype", "threads", "tokens", "samoyeds ms", "inductor/samoyeds", "mm/samoyeds")
    table = Table(title="Sparse experts on the CPU, whole block")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        cells = {**row, "samoyeds ms": row["ms"]["samoyeds"]}
        table.add_row(*(str(cells[column]) for column in columns))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, one pattern, four numbers of tokens")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads (default: 1)")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--shapes", nargs="+", help="beginnings of names of shapes")
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu.json")
    options = parser.parse_args()
    names = options.shapes or (["mixtral", "qwen3"] if options.quick else [""])
    shapes = [shape for shape in SHAPES if shape.startswith(tuple(names))]
    configs = options.configs or (["1:2:32"] if options.quick else list(CONFIGS))
    tokens = tuple(options.tokens or (TOKENS[:4] if options.quick else TOKENS))
    where, rows = {**machine(), "isas": [isa.name for isa in usable_isas("bfloat16")]}, []
    for threads in options.threads:
        for shape in shapes:
            for config in configs:
                for dtype in options.dtypes:
                    for row in measure(
                        shape, config, dtype, tokens, threads, 1.5 if options.quick else options.seconds
                    ):
                        rows.append(row)
                        print(json.dumps(row), flush=True)
    where["load_after"] = machine()["load_before"]
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
