"""The frame around the pipeline's steps: each is timed, verified, dumped, and undone if anything fails."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx

from samoyeds_compile.errors import GraphInvariantError
from samoyeds_compile.graph.collectives import collectives_of
from samoyeds_compile.graph.edit import Snapshot
from samoyeds_compile.graph.values import graph_modules
from samoyeds_compile.report.advice import advise
from samoyeds_compile.report.dump import GraphDump
from samoyeds_compile.report.model import GraphReport, StepReport
from samoyeds_compile.report.trace import trace_graph

if TYPE_CHECKING:
    from samoyeds_compile.backend import Match
    from samoyeds_compile.lower.kernels import KernelChoice

logger = logging.getLogger(__name__)
R = TypeVar("R")


class Steps:
    """Runs named steps over one graph and keeps the record of them."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], dump: Path | None) -> None:
        self.gm = gm
        reason, source = _break_of(gm)
        nodes = _count(gm)
        self.report = GraphReport(compile_id(), nodes, nodes, break_reason=reason, break_source=source)
        self.report.collectives = list(collectives_of(graph_modules(gm)))
        self.dump = GraphDump(dump, gm, example_inputs) if dump is not None else None
        self._snapshot: Snapshot | None = None

    @contextlib.contextmanager
    def protecting(self) -> Iterator[None]:
        """Whatever fails inside, the graph is put back as it came, the report says so, and compilation goes on."""
        try:
            yield
        except Exception as error:
            logger.exception("samoyeds failed on graph %s; the original graph is compiled instead", self.report.name)
            if self._snapshot is not None:
                self._snapshot.restore()
            self._give_up(f"{type(error).__name__}: {error}")
        self.report.nodes_after = _count(self.gm)
        advise(self.report.blocks)
        if self.dump is not None:
            self.dump.finish(self.report, self.gm)

    def run(self, name: str, step: Callable[..., R], *args: Any, edits: bool = False) -> R:
        """Run one step.

        Args:
            name: what the report calls it.
            step: the function to run on ``args``.
            edits: whether the step changes the graph, which is then verified and dumped.

        Raises:
            GraphInvariantError: the step left a graph that is not well formed, or moved a collective.
        """
        start = time.perf_counter()
        if edits and self._snapshot is None:
            self._snapshot = Snapshot(graph_modules(self.gm))
        result = step(*args)
        if edits:
            self._verify(name)
        elapsed = (time.perf_counter() - start) * 1e3
        self.report.steps.append(StepReport(name, round(elapsed, 3), _count(self.gm)))
        if edits:
            trace_graph(name, self.gm)
        if edits and self.dump is not None:
            self.dump.graph(f"after_{name}", self.gm)
        return result

    def found(self, matches: Sequence[Match]) -> None:
        """Dump what is to be seen of the blocks before they are rewritten."""
        if self.dump is not None:
            self.dump.found(self.gm, matches)

    def kernels(self, choices: Sequence[KernelChoice]) -> None:
        """Note how blocks are computed, and dump the text of kernels."""
        self.report.kernels = [str(choice) for choice in choices]
        for choice in choices:
            if choice.block is not None:
                self.report.blocks[choice.block].kernel = str(choice)
        if self.dump is not None:
            self.dump.kernels(choices)

    def _verify(self, step: str) -> None:
        for module in graph_modules(self.gm):
            try:
                module.graph.lint()
            except RuntimeError as error:
                raise GraphInvariantError(f"step {step!r} left a malformed graph: {error}") from error
            module.recompile()
        found = list(collectives_of(graph_modules(self.gm)))
        if found != self.report.collectives:
            raise GraphInvariantError(f"step {step!r} changed collectives from {self.report.collectives} to {found}")

    def _give_up(self, problem: str) -> None:
        self.report.problem = problem
        for block in self.report.blocks:
            block.rewritten, block.became, block.routing = False, (), None
            block.reason = block.reason or problem


def compile_id() -> str:
    """Dynamo's id of the compilation under way, such as ``0/0``; empty outside of one."""
    current = torch._guards.CompileContext.current_compile_id()
    return "" if current is None else str(current)


def _count(gm: fx.GraphModule) -> int:
    return sum(len(m.graph.nodes) for m in graph_modules(gm))


def _break_of(gm: fx.GraphModule) -> tuple[str, str]:
    """(reason, file:line) of the graph break that ended the graph, empty if none did."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return "", ""
    frame = why.user_stack[-1] if why.user_stack else None
    return str(why.reason), f"{frame.filename}:{frame.lineno}" if frame else ""
