"""Layouts chosen by cost, against one fixed order and against the dearest choice, on a CPU.

    python -m benchmarks.layout [--quick] [--json FILE]

Arms of one point take turns, A B C, C B A, ..., with the last-level cache flushed before each call:

- ``on``: layouts as the pass chooses them (option ``layouts="cheapest"``).
- ``off``: ``token_major``: rows stand token by token on every edge, and are turned where tiles are read.
- ``worst``: ``dearest``: the kernel that is wrong for so many tokens, and rows turned on every edge.

All three give the same numbers, which is checked. Then the number of tokens from which tiles are faster is measured
and compared with the one that was solved for, and the time that planning 48 layers takes is printed. ``--quick`` takes
about ten minutes, the full run about an hour.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import DTYPES, RESULTS, machine, quieten
from benchmarks.cpu.shapes import DENSE, SHAPES, build
from benchmarks.cpu.timing import Timing, clock_of, measure
from benchmarks.layout.crossing import crossings
from benchmarks.layout.planning import planning
from samoyeds_compile import Report
from samoyeds_compile.layout.cold import Flush

ARMS = {"on": "cheapest", "off": "token_major", "worst": "dearest"}
TOKENS = (1, 16, 64, 256, 1024, 4096)
MODELS = ("mixtral", "qwen3")
KERNELS = ("fp32", "bf16")
"""Dtypes for which there are kernels."""


def compiled(block: torch.nn.Module, layouts: str, report: Report) -> Any:
    """Without Inductor, as all that differs is in the kernel; each number of tokens has a graph and is known there."""
    options = {"layouts": layouts, "base": "eager", "validate": False, "report": report}
    return torch.compile(block, backend="samoyeds", dynamic=False, options=options)


def point(block: torch.nn.Module, x: torch.Tensor, threads: int, seconds: float, flush: Flush) -> dict[str, Any]:
    """One block at one number of tokens."""
    torch.compiler.reset()
    reports = {arm: Report() for arm in ARMS}
    models = {arm: compiled(block, layouts, reports[arm]) for arm, layouts in ARMS.items()}
    outputs = [model(x) for model in models.values()]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=2e-2, atol=2e-2 * float(outputs[0].abs().max()))
    timing = measure({arm: lambda m=model: m(x) for arm, model in models.items()}, threads, seconds, flush)
    layout = next(layout for graph in reports["on"].graphs for layout in graph.layouts)
    tokens = x.shape[0] * x.shape[1]
    saved = {"conversions": layout.conversions, "bytes": layout.bytes_per_token * tokens}
    return {"tokens": tokens, "few": layout.few, **_figures(timing), **saved, **timing.summary()}


def _figures(timing: Timing) -> dict[str, Any]:
    ms = {arm: round(timing.median(arm), 3) for arm in ARMS}
    ratios = {f"{arm}/on": round(timing.ratio(arm, "on"), 3) for arm in ARMS if arm != "on"}
    return {"ms": ms, "ratios": ratios}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer points, shorter rounds")
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(MODELS))
    parser.add_argument("--patterns", nargs="+", default=[DENSE, "1:2:32"])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS / "layout.json")
    args = parser.parse_args()
    quieten()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64
    tokens = args.tokens or ([16, 256, 1024] if args.quick else TOKENS)
    seconds = 1.0 if args.quick else 5.0
    results: dict[str, Any] = {"machine": machine(), "threads": args.threads, "clock": clock_of(args.threads).__name__}
    results["points"], results["crossings"], flush = [], [], Flush()
    with torch.no_grad():
        for model in args.models:
            for dtype in KERNELS:
                blocks = build(SHAPES[model], DTYPES[dtype], args.patterns)
                for pattern in args.patterns:
                    block = blocks.dense if pattern == DENSE else blocks.sparse[pattern]
                    key = {"model": model, "dtype": dtype, "pattern": pattern}
                    for count in tokens:
                        x = torch.randn(1, count, SHAPES[model].config.hidden_size).to(DTYPES[dtype])
                        results["points"].append(key | point(block, x, args.threads, seconds, flush))
                        print(json.dumps(results["points"][-1]), flush=True)
                    results["crossings"].append(key | crossings(block, SHAPES[model].config, flush))
                    print(json.dumps(results["crossings"][-1]), flush=True)
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
    results["planning"] = planning()
    args.json.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(_table(results["points"]), results["planning"])


def _table(points: list[dict[str, Any]]) -> Table:
    table = Table(title="ms with layouts by cost, and how much longer the others take")
    for name in ("model", "dtype", "pattern", "tokens", "on, ms", "off / on", "worst / on", "bytes saved"):
        table.add_column(name, justify="right")
    for p in points:
        ratios = (f"{p['ratios'][f'{arm}/on']:.2f}" for arm in ("off", "worst"))
        ms, saved = f"{p['ms']['on']:.2f}", f"{p['bytes'] / 1e6:.1f} MB"
        table.add_row(p["model"], p["dtype"], p["pattern"], str(p["tokens"]), ms, *ratios, saved)
    return table


if __name__ == "__main__":
    main()
