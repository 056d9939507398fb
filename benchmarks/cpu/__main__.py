"""The whole block through ``torch.compile``, router included, on a CPU: Samoyeds against what there is.

    python -m benchmarks.cpu [--quick] [--resume] [--json FILE]

Arms of one point, taken in turns, A B C ... C B A, with the last-level cache flushed before each call:

- ``samoyeds PATTERN``: the unmodified block of transformers; dense, or its experts packed (``sparsify_``).
- ``eager``, ``inductor``: the same block, dense.
- ``mm``, ``onednn``, ``mkl``: only the products of the routed tokens, dense, expert by expert; see `products`.

Outputs are compared with eager on the same weights. Prints ratios and rates against the roofline that is measured
first, and writes FILE after each point, at the end also a table (.md) and a figure (.png) beside it. See `timing` for
clocks and foreign load. The full run takes hours, ``--quick`` some minutes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable

from benchmarks.common import DTYPES, RESULTS, machine, quieten
from benchmarks.cpu import roofline
from benchmarks.cpu.arms import PEERS, PREFIX, compile_arms
from benchmarks.cpu.plot import plot
from benchmarks.cpu.point import inputs_of, measure_point
from benchmarks.cpu.results import Results, ResumeError
from benchmarks.cpu.shapes import DENSE, PATTERNS, SHAPES, TOKENS, build, references
from benchmarks.cpu.tables import markdown, tables
from benchmarks.cpu.timing import QUIET
from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_compile.layout.cold import Flush

QUICK = {
    "shapes": ["mixtral", "qwen3"], "patterns": [DENSE, "2:4", "1:2:32"], "tokens": [1, 16, 256], "threads": [1],
    "seconds": 1.0,
}  # fmt: skip
FULL = {
    "shapes": list(SHAPES), "patterns": [DENSE, *PATTERNS], "tokens": list(TOKENS), "threads": [1, 2], "seconds": 6.0,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What to measure; fields are named as the options."""

    shapes: list[str]
    patterns: list[str]
    peers: list[str]
    dtypes: list[str]
    tokens: list[int]
    threads: list[int]
    seconds: float

    def keys(self, shape: str, dtype: str) -> list[tuple[Any, ...]]:
        """What names the points of one shape and dtype in the results."""
        return [(shape, dtype, *pair) for pair in itertools.product(self.threads, self.tokens)]

    @property
    def arms(self) -> list[str]:
        """Their names."""
        return [*(PREFIX + pattern for pattern in self.patterns), *self.peers]


def measure(plan: Plan, results: Results, advance: Callable[[str], None]) -> None:
    """All points that the results lack; models of one shape and dtype live at a time."""
    flush = Flush()
    for name in plan.shapes:
        for dtype in plan.dtypes:
            lacking = [key[2:] for key in plan.keys(name, dtype) if results.lacks(key, plan.arms)]
            _measure_blocks(plan, results, name, dtype, lacking, flush, advance)
            gc.collect()


def _measure_blocks(
    plan: Plan, results: Results, name: str, dtype: str, points: list[tuple[int, int]], flush: Flush,
    advance: Callable[[str], None],
) -> None:  # fmt: skip
    if not points:
        return
    advance(f"{name} {dtype}: pruning")
    shape, counts = SHAPES[name], tuple(sorted({tokens for _, tokens in points}))
    blocks = build(shape, DTYPES[dtype], plan.patterns)
    inputs = inputs_of(shape.config.hidden_size, counts, DTYPES[dtype])
    expected = references(blocks, inputs)
    for threads in plan.threads:
        torch.set_num_threads(threads)
        compiled = compile_arms(blocks, plan.patterns, plan.peers, DTYPES[dtype])
        peaks = roofline.Roofline(**results.rooflines[str(threads)])
        for number, tokens in enumerate(counts):
            if (threads, tokens) not in points:
                continue
            advance(f"{name} {dtype}, {threads} threads, {tokens} tokens")
            wanted = {pattern: outputs[number] for pattern, outputs in expected.items()}
            row = measure_point(compiled, inputs[number], wanted, dtype, peaks, plan.seconds, flush)
            results.add({"shape": name, "dtype": dtype, "threads": threads, "tokens": tokens, **row})


def show(console: Console, results: Results) -> None:
    """The tables."""
    for table in tables(list(results.rows.values())):
        shown = RichTable(*table.header, title=table.title, title_justify="left")
        for line in table.lines:
            shown.add_row(*line)
        console.print(shown)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, three patterns, three numbers of tokens")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--patterns", nargs="+", choices=[DENSE, *PATTERNS], help="arms of Samoyeds")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="the other arms")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, help="of rounds for each point; five rounds at least")
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu.json", metavar="FILE")
    parser.add_argument("--resume", action="store_true", help="keep the points of FILE that were not disturbed")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    """What was asked for, the rest from the quick or the full plan."""
    default = QUICK if options.quick else FULL
    given = {key: getattr(options, key) or value for key, value in default.items()}
    return Plan(peers=options.peers, dtypes=options.dtypes, **given)


def measure_rooflines(plan: Plan, results: Results) -> Iterator[str]:
    """Of each number of threads that has none, or a disturbed one; yields what to print."""
    for threads in plan.threads:
        if results.rooflines.get(str(threads), {"foreign": 1.0})["foreign"] > QUIET:
            results.rooflines[str(threads)] = roofline.measure(threads).row()
        yield f"Roofline: {results.rooflines[str(threads)]}"


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    options, console = parse(arguments), Console(width=None if sys.stdout.isatty() else 160)
    plan = plan_of(options)
    quieten()
    where = {**machine(), "isas": [isa.name for isa in usable_isas("bfloat16")]}
    del where["threads"]  # each row has its own
    try:
        results = Results.open(options.json, where, options.resume)
    except ResumeError as error:
        raise SystemExit(str(error)) from None
    for line in measure_rooflines(plan, results):
        console.print(line)
    keys = [key for shape in plan.shapes for dtype in plan.dtypes for key in plan.keys(shape, dtype)]
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(keys))

        def advance(what: str) -> None:
            progress.update(task, description=what, completed=sum(key in results.rows for key in keys))

        measure(plan, results, advance)
        advance("done")
    results.machine["load_after"] = machine()["load_before"]
    results.write()
    content = json.loads(options.json.read_text())
    options.json.with_suffix(".md").write_text(markdown(content))
    plot(content, options.json.with_suffix(".png"))
    show(console, results)


if __name__ == "__main__":
    main()
