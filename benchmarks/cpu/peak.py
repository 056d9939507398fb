"""Memory that a call of a compiled block takes at its peak: ``python -m benchmarks.cpu.peak``. Linux only.

What the kernel says of this process (VmHWM, reset before; VmRSS, after the allocator gave back what it could), for each
shape, pattern and number of tokens, against a bound: inputs, outputs, and two activations for each slot, 2 * T * K * I
elements in the dtype of the block. Inputs are there before and count on neither side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import DTYPES, MIB, RESULTS, forget_peak, machine, quieten, resident
from benchmarks.cpu.arms import kernel_of
from benchmarks.cpu.point import inputs_of
from benchmarks.cpu.shapes import DENSE, PATTERNS, SHAPES, Shape, build, routing
from samoyeds_compile import Report

SLACK = 1.0
"""MiB: pages that are touched in part, stacks of threads, and what Python makes in a call."""
CALLS = 3


@dataclass(frozen=True)
class Peak:
    """MiB ``above`` what the process held before a call, at most, and the ``bound`` for it; what ``kernel`` ran."""

    above: float
    bound: float
    kernel: str

    @property
    def holds(self) -> bool:
        """Whether the bound is kept, `SLACK` aside."""
        return self.above <= self.bound + SLACK


def peak_of(block: nn.Module, x: torch.Tensor, width: int) -> Peak:
    """The largest peak of some calls, after one that compiles.

    Args:
        block: is compiled with Samoyeds.
        x: tokens, [1, T, H].
        width: I, columns of an expert's activations.
    """
    torch._dynamo.reset()
    report = Report()
    compiled = torch.compile(block, backend="samoyeds", dynamic=True, options={"report": report})
    slots = routing(block, x).numel()
    compiled(x)
    found = []
    for _ in range(CALLS):
        before = resident()
        forget_peak()
        compiled(x)
        found.append(resident(peak=True) - before)
    bound = (x.nbytes + 2 * slots * width * x.element_size()) / MIB
    return Peak(max(found), bound, kernel_of(report))


def measure(
    shape: Shape, dtype: torch.dtype, patterns: Sequence[str], tokens: tuple[int, ...]
) -> list[dict[str, object]]:
    """A row for each pattern and number of tokens."""
    blocks, rows = build(shape, dtype, patterns), []
    width = blocks.dense.experts.down_proj.shape[2]
    for pattern in patterns:
        block = blocks.dense if pattern == DENSE else blocks.sparse[pattern]
        for count, x in zip(tokens, inputs_of(shape.config.hidden_size, tokens, dtype), strict=True):
            peak = peak_of(block, x, width)
            rows.append({"pattern": pattern, "tokens": count, "peak_mib": round(peak.above, 2),
                         "bound_mib": round(peak.bound, 2), "holds": peak.holds, "kernel": peak.kernel})  # fmt: skip
    return rows


@torch.no_grad()
def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["mixtral", "qwen3"])
    parser.add_argument("--patterns", nargs="+", choices=[DENSE, *PATTERNS], default=[DENSE, "2:4", "1:2:32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu_peak.json", metavar="FILE")
    options = parser.parse_args()
    quieten()
    rows = []
    for name in options.shapes:
        for dtype in ("fp32", "bf16"):
            for row in measure(SHAPES[name], DTYPES[dtype], options.patterns, tuple(options.tokens)):
                rows.append({"shape": name, "dtype": dtype, **row})
                print(rows[-1], flush=True)
    options.json.write_text(json.dumps({"machine": machine(), "slack_mib": SLACK, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
