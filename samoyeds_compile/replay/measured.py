"""``measured.json``: how long a dumped block takes alone, as it was and as it is now, both compiled."""

from __future__ import annotations

import json
import platform
import runpy
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from samoyeds_compile.layout.cold import Flush
from samoyeds_compile.report import files

NAME = "measured.json"


@dataclass(frozen=True)
class Measured:
    """Times of one block.

    Attributes:
        milliseconds: medians, of the original (``before``) and of what replaced it (``after``).
        calls: of each; both take turns.
        base: what compiled them: the original without rewrites.
        cold: whether caches were emptied before each call, as other layers would and the cost model assumes.
        inputs: dtype and shape of each, or the number that it is.
        threads: of PyTorch.
        machine, torch: the processor, and PyTorch's version.
    """

    milliseconds: dict[str, float]
    calls: int
    base: str
    cold: bool
    inputs: list[str]
    threads: int
    machine: str
    torch: str

    @property
    def line(self) -> str:
        """For people."""
        before, after = self.milliseconds["before"], self.milliseconds["after"]
        return (
            f"compiled by {self.base}: {before:.4f} ms before, {after:.4f} ms after ({self.calls} calls, cold caches)"
        )


def write_measured(program: Path, base: str = "inductor", calls: int = 15) -> Measured:
    """Measure the block of a dumped program, write the file beside it, and bring the folder's reports up to date.

    Args:
        program: ``block.py`` in the folder of a block.
        base: what compiles both, one of `samoyeds_compile.options.BASES`.
        calls: of each.
    """
    from samoyeds_compile.report.dump import refresh_reports

    measured = measure(runpy.run_path(str(program)), base, calls)
    files.write(program.with_name(NAME), json.dumps(asdict(measured), indent=1))
    refresh_reports(program.resolve().parents[3])
    return measured


@torch.no_grad()
def measure(names: dict[str, Any], base: str, calls: int) -> Measured:
    """Times of the two modules that a program defines, which take turns."""
    torch._dynamo.reset()
    arms = {"before": _compiled(names["Before"](), base, False), "after": _compiled(names["After"](), base, True)}
    flush, times = Flush(), {name: list[float]() for name in arms}
    for number in range(calls + 1):  # the first round compiles
        for name, arm in arms.items():
            inputs = names["make_inputs"]()  # of its own, as a block may write to them
            flush()
            start = time.perf_counter()
            arm(*inputs)
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: round(statistics.median(found), 5) for name, found in times.items()}
    shapes = [_shown(given) for given in names["make_inputs"]()]
    return Measured(medians, calls, base, True, shapes, torch.get_num_threads(), _processor(), torch.__version__)


def _compiled(module: Any, base: str, rewrite: bool) -> Any:
    options: dict[str, Any] = {
        "base": base,
        "rewrite": rewrite,
        "dump": None,
        "record_routing": False,
        "profile_ranges": False,
    }
    return torch.compile(module, backend="samoyeds", options=options)


def _shown(given: Any) -> str:
    plain = isinstance(given, torch.Tensor)
    return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}" if plain else repr(given)


def _processor() -> str:
    """Its name, where Linux or the platform tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
