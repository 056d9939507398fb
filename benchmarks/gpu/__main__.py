"""Blocks of experts on a CUDA device: ``python -m benchmarks.gpu``, in less than ten minutes.

``--quick`` takes one shape. ``--choices`` times what the cost model takes against what max-autotune takes, in place of
kinds and peers. ``--dry-run`` walks the whole way on a machine without a GPU, with tiny shapes, and measures nothing.
``--compile-only`` needs no device either: it compiles every CUDA kernel for every target and prints what machine code
came out; ``--json FILE`` keeps that, ``--page`` writes it into docs/gpu_cuda.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import common, cubins
from benchmarks.gpu import ours, report, supervise
from benchmarks.gpu.losses import losses
from benchmarks.gpu.losses import table as losses_table
from benchmarks.gpu.machine import DryMachine, Machine
from benchmarks.gpu.peers import PEERS
from benchmarks.gpu.rows import with_rates, with_ratios
from benchmarks.gpu.shapes import SHAPES, SMALL, TOKENS, Shape
from benchmarks.gpu.worker import BrokenDevice, Worker
from samoyeds_codegen.gpu.apart import SECONDS as PROOF_SECONDS

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
    parser.add_argument("--choices", action="store_true", help="what the cost model loses against max-autotune")
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
                worker.run(ours.choices() if options.choices else [*ours.contenders(), *PEERS], options.tokens)
        except BrokenDevice as error:
            sys.exit(f"the device is broken: {error}")


def main(options: argparse.Namespace) -> None:
    console = Console(width=report.WIDTH)
    where, rates = _machine(options)
    outcome = _measured(options, lambda event: _echo(console, event))
    by_name = {shape.name: shape for shape in _shapes(options)}
    rows = [with_rates(row, by_name[row["shape"]], where, rates) for row in outcome.rows if row["shape"] in by_name]
    results: dict[str, Any] = {"machine": where, "rows": with_ratios(rows), "notes": outcome.notes}
    report.show(console, results["rows"], outcome.notes)
    if lost := losses(rows):
        console.print(losses_table(lost, report.WIDTH))
        results["losses"] = lost
    console.print("saved to", report.save(results, options.folder))


def _machine(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[float, float]]:
    """What it is, and what its roofs are made of. Its memory belongs to the workers then."""
    machine = DryMachine() if options.dry_run else Machine()
    where, rates = {**common.machine(), **machine.describe()}, machine.rates()
    del machine
    torch.cuda.empty_cache()
    return where | {"copy_bytes_per_s": rates[0], "product_flop_per_s": rates[1], "dtype": options.dtype}, rates


def _shapes(options: argparse.Namespace) -> tuple[Shape, ...]:
    shapes = SMALL if options.dry_run else SHAPES
    return shapes[:1] if options.quick else shapes


def _measured(options: argparse.Namespace, heard: Callable[[Mapping[str, Any]], None]) -> supervise.Outcome:
    """All shapes. Where kernels have to prove themselves they do so for a tiny one first, and the proofs are kept."""
    flags = [f"--{name}" for name in ("dry-run", "choices") if vars(options)[name.replace("-", "_")]]

    def command(*arguments: Any) -> list[str]:
        return [*supervise.command(*arguments), "--dtype", options.dtype, *flags]

    tokens = options.tokens or (DRY_TOKENS if options.dry_run else TOKENS)
    first = SMALL[:1] if options.choices and not options.dry_run else ()
    silence = supervise.SILENCE + (PROOF_SECONDS if options.choices else 0)
    return supervise.measure((*first, *_shapes(options)), options.seconds, command, tokens, silence, heard)


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
