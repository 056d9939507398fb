"""Blocks of experts on a CUDA device: ``python -m benchmarks.gpu``, in less than ten minutes.

``--quick`` takes one shape. ``--dry-run`` walks the whole way on a machine without a GPU, with tiny shapes, and
measures nothing. ``--compile-only`` needs no device either: it compiles every CUDA kernel for every target and prints
what machine code came out; ``--json FILE`` keeps that, ``--page`` writes it into docs/gpu_cuda.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import common, cubins
from benchmarks.gpu import ours, report, supervise
from benchmarks.gpu.machine import DryMachine, Machine
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.rows import with_rates, with_ratios
from benchmarks.gpu.shapes import SHAPES, SMALL, TOKENS, Shape
from benchmarks.gpu.worker import BrokenDevice, Worker

SECONDS = 500.0
"""For all shapes; what comes before and after takes less than half a minute."""
DRY_TOKENS = (8, 1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    parser.add_argument("--folder", type=Path, default=report.FOLDER, help="where the results go")
    parser.add_argument("--worker", choices=[s.name for s in (*SHAPES, *SMALL)], help=argparse.SUPPRESS)
    parser.add_argument("--events", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--exclude", action="append", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


def work(options: argparse.Namespace) -> None:
    """A worker: one shape; see `supervise`."""
    with options.events.open("a", buffering=1) as stream:
        shape = next(s for s in (*SHAPES, *SMALL) if s.name == options.worker)

        def say(event: Mapping[str, Any]) -> None:
            stream.write(json.dumps(event) + "\n")

        machine = DryMachine() if options.dry_run else Machine()
        deadline = time.monotonic() + options.seconds
        dtype = common.DTYPES[options.dtype]
        worker = Worker(machine, shape, dtype, say, deadline, frozenset(options.exclude))
        try:
            with torch.no_grad():
                worker.run([*ours.contenders(), *PEERS], options.tokens)
        except BrokenDevice as error:
            sys.exit(f"the device is broken: {error}")


def main(options: argparse.Namespace) -> None:
    console = Console(width=report.WIDTH)
    dry: bool = options.dry_run
    shapes: tuple[Shape, ...] = SMALL if dry else SHAPES
    machine = DryMachine() if dry else Machine()
    where, rates = {**common.machine(), **machine.describe()}, machine.rates()
    del machine  # its memory belongs to the workers
    if not dry:
        torch.cuda.empty_cache()
    where |= {"copy_bytes_per_s": rates[0], "product_flop_per_s": rates[1], "dtype": options.dtype}

    def command(*arguments: Any) -> list[str]:
        flags = ["--dtype", options.dtype, *(["--dry-run"] if dry else [])]
        return [*supervise.command(*arguments), *flags]

    tokens = options.tokens or (DRY_TOKENS if dry else TOKENS)
    chosen = shapes[:1] if options.quick else shapes
    outcome = supervise.measure(chosen, options.seconds, command, tokens, heard=lambda e: _echo(console, e))
    by_name = {shape.name: shape for shape in shapes}
    rows = with_ratios([with_rates(row, by_name[row["shape"]], where, rates) for row in outcome.rows])
    report.show(console, rows, outcome.notes)
    console.print("saved to", report.save(where, rows, outcome.notes, options.folder))


def _echo(console: Console, event: Mapping[str, Any]) -> None:
    """Something to look at while it runs."""
    if event["event"] in ("timing", "failed"):
        console.print(*(str(value) for value in event.values()), markup=False)


if __name__ == "__main__":
    given = parsed()
    if given.compile_only:
        cubins.main(given.json, given.page)
    elif given.worker:
        work(given)
    elif given.dry_run or torch.cuda.is_available():
        main(given)
    else:
        sys.exit("no CUDA device here; nothing measured (--dry-run walks the way, --compile-only compiles)")
