"""The arms of one shape, dtype and number of threads, compiled once; a point adds inputs of some number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu.products import LIBRARIES, Arm, missing, products_of, run
from benchmarks.cpu.shapes import DENSE, PATTERNS, Blocks, Sizes, sizes
from samoyeds_compile import Report

EAGER, INDUCTOR = "eager", "inductor"
PEERS = (EAGER, INDUCTOR, *LIBRARIES)
PREFIX = "samoyeds "
BEST = "best dense"
"""The fastest of the libraries at a point."""


@dataclass
class Compiled:
    """What is called with ``x``; nothing is compiled before the first call.

    Attributes:
        blocks: the modules.
        calls: Samoyeds by pattern, eager and Inductor, by name of the arm.
        reports: of Samoyeds, by pattern.
        libraries: those that are there.
        skipped: those that are not, and why.
    """

    blocks: Blocks
    calls: dict[str, Callable[[Tensor], Tensor]]
    reports: dict[str, Report]
    libraries: tuple[str, ...]
    skipped: dict[str, str]

    def arms(self, x: Tensor, ids_TK: Tensor) -> dict[str, Arm]:
        """All arms for one input; libraries pack the weights that they need here."""
        found: dict[str, Arm] = {name: partial(call, x) for name, call in self.calls.items()}
        products = products_of(self.blocks.dense, ids_TK, x) if self.libraries else []
        for name in self.libraries:
            found[name] = partial(run, [LIBRARIES[name](product) for product in products])
        return found

    def kernels(self) -> dict[str, str]:
        """What the reports say of each pattern: the kernel of the experts, or that there is none."""
        return {name: kernel_of(report) for name, report in self.reports.items()}

    def sizes(self, arm: str, x: Tensor, ids_TK: Tensor) -> Sizes:
        """What an arm reads and computes."""
        pattern = arm.removeprefix(PREFIX)
        if pattern in self.blocks.sparse:
            return sizes(self.blocks.sparse[pattern], ids_TK, x, float(PATTERNS[pattern].density))
        return sizes(self.blocks.dense, ids_TK, x)


def compile_arms(blocks: Blocks, patterns: Sequence[str], peers: Sequence[str], dtype: torch.dtype) -> Compiled:
    """Each arm is a ``torch.compile`` of the unmodified module with a symbolic number of tokens.

    All arms share the code of one class, and Dynamo gives up on code that was compiled too often.
    """
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 8 * (len(patterns) + len(peers))
    reports = {pattern: Report() for pattern in patterns}
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for pattern in patterns:
        block = blocks.dense if pattern == DENSE else blocks.sparse[pattern]
        calls[PREFIX + pattern] = _compile(block, "samoyeds", options={"report": reports[pattern]})
    if EAGER in peers:
        calls[EAGER] = blocks.dense
    if INDUCTOR in peers:
        calls[INDUCTOR] = _compile(blocks.dense, "inductor")
    wanted = [name for name in LIBRARIES if name in peers]
    skipped = missing(wanted, dtype)
    return Compiled(blocks, calls, reports, tuple(name for name in wanted if name not in skipped), skipped)


def _compile(block: nn.Module, backend: str, **given: Any) -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(block, backend=backend, dynamic=True, **given)
    return compiled


def kernel_of(report: Report) -> str:
    """What a report says of the experts of the only block."""
    named = [kernel for graph in report.graphs for kernel in graph.kernels]
    if named:
        return named[0]
    return "stages" if report.rewritten else "not rewritten"
