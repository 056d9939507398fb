"""``python -m samoyeds_compile.repro FOLDER BLOCK``: run one dumped block alone, as it was and as it is now.

FOLDER is a dump folder, or the folder of one of its graphs; BLOCK the number of a block in its graph, ``GRAPH/BLOCK``
in a folder of several graphs. The exit code is 0 if both compute the same, 1 if they do not, 2 if there is no such
block. ``--time`` also compiles both, measures them, and writes ``measured.json`` beside the program of the block; the
page shows it next to what the cost model expects.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from samoyeds_compile.errors import DumpError
from samoyeds_compile.options import BASES
from samoyeds_compile.replay.measured import write_measured


@dataclass(frozen=True)
class Run:
    """What came of one set of inputs.

    Attributes:
        seed: of the inputs.
        deviation: largest one, relative to the largest value; None if they differ by more than rounding.
        problem: what was wrong; empty if nothing was.
        milliseconds: of the original and of its replacement, uncompiled: medians of a few calls.
    """

    seed: int
    deviation: float | None
    problem: str
    milliseconds: tuple[float, float]


def find_block(folder: Path, block: str) -> Path:
    """The program of a block.

    Args:
        folder: a dump folder or the folder of one graph.
        block: ``BLOCK`` or ``GRAPH/BLOCK``, numbers.

    Raises:
        DumpError: there is no such folder, graph or block; the message lists the blocks that there are.
    """
    graph, _, number = block.rpartition("/")
    graphs = [folder] if (folder / "before.py").exists() else sorted(folder.glob("graph_*"))
    programs = {
        (path.resolve().name.removeprefix("graph_"), file.parent.name): file
        for path in graphs
        for file in path.glob("blocks/*/block.py")
    }
    wanted = (graph.zfill(3), number)
    found = [file for name, file in programs.items() if name == wanted or (not graph and name[1] == number)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(map("/".join, sorted(programs))) or "none; dump one with options={'dump': FOLDER}"
    problem = "is in several graphs, name one of them" if found else "is not there"
    raise DumpError(f"block {block!r} {problem} in {folder}; there are programs of blocks {there}")


def replay(program: Path, seeds: Sequence[int], calls: int = 5) -> list[Run]:
    """Run a dumped block with inputs of several seeds."""
    names = runpy.run_path(str(program))
    before, after = names["Before"](), names["After"]()
    return [_run(names, before, after, seed, calls) for seed in seeds]


@torch.no_grad()
def _run(names: dict[str, Any], before: Any, after: Any, seed: int, calls: int) -> Run:
    def result(module: Any) -> Any:  # of inputs of its own, as a block may write to them
        return module(*names["make_inputs"](seed))

    times = (_milliseconds(lambda: result(before), calls), _milliseconds(lambda: result(after), calls))
    try:
        return Run(seed, names["compare"](result(after), result(before)), "", times)
    except AssertionError as error:
        return Run(seed, None, str(error), times)


def _milliseconds(call: Callable[[], Any], calls: int) -> float:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(times), 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m samoyeds_compile.repro", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("folder", type=Path, help="a dump folder, or the folder of one graph")
    parser.add_argument("block", help="BLOCK, or GRAPH/BLOCK")
    parser.add_argument("--seeds", type=int, default=3, help="how many sets of inputs (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--time", action="store_true", help="measure both compiled, and write measured.json")
    parser.add_argument("--base", choices=BASES, default="inductor", help="what compiles them (default: inductor)")
    chosen = parser.parse_args(arguments)
    try:
        program = find_block(chosen.folder, chosen.block)
    except DumpError as error:
        sys.stderr.write(f"samoyeds: {error}\n")
        return 2
    runs = replay(program, range(chosen.seeds))
    if chosen.json:
        sys.stdout.write(json.dumps([asdict(run) for run in runs], indent=2) + "\n")
    else:
        sys.stdout.write(f"{program}\n" + "".join(f"{_line(run)}\n" for run in runs))
    if chosen.time:
        measured = write_measured(program, chosen.base)
        if not chosen.json:
            sys.stdout.write(f"{measured.line}\n")
    return int(any(run.problem for run in runs))


def _line(run: Run) -> str:
    verdict = run.problem or f"equal, largest deviation {run.deviation:.1e}"
    before, after = run.milliseconds
    return f"seed {run.seed}: {verdict}; uncompiled {before:.2f} ms before, {after:.2f} ms after"


if __name__ == "__main__":
    sys.exit(main())
