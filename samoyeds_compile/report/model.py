"""The report: plain data about every graph compiled and every MoE block found in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from samoyeds_compile.report.layouts import LayoutReport
from samoyeds_compile.report.routing import RoutingReport

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA_VERSION = 1


@dataclass
class BlockReport:
    """One MoE block, rewritten or not.

    Attributes:
        module: dotted path of the module that holds the experts, empty for plain functions.
        source: ``file:line: code`` of the block.
        family: the surface pattern that matched or came nearest, empty if the block reached no graph.
        rewritten: whether it runs as ``samoyeds::`` ops.
        reason: why it was not rewritten; None if it was.
        reason_source: ``file:line: code`` of the first failed condition.
        remedy: what to change so that it is rewritten; empty if it was.
        experts: E; None where the match did not get that far, as with the other sizes.
        top_k: K.
        hidden_size: H.
        intermediate_size: I.
        activation: common name or expression of the activation.
        gate_up_layout, weight_layout: how the weights are stored.
        router: what kind of router is in front of it.
        router_fused: whether the router runs as one ``samoyeds::router`` (option ``fuse_routers``).
        router_reason: why not, if fusing was asked for.
        parameters: names of the expert weights.
        became: the ops it turned into.
        kernel: by which kernel it is computed, or why by none; empty if it was not rewritten.
        deviation: largest relative deviation seen when the rewrite was validated; None if it was not.
        routing: how many slots each expert got, with option ``record_routing``; None without it, and for blocks whose
            rows come dispatched to experts, as the graph has no ids of theirs.
    """

    module: str
    source: str
    family: str
    rewritten: bool
    reason: str | None = None
    reason_source: str = ""
    remedy: str = ""
    experts: int | None = None
    top_k: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    activation: str = ""
    gate_up_layout: str = ""
    weight_layout: str = ""
    router: str = ""
    router_fused: bool = False
    router_reason: str | None = None
    parameters: tuple[str, ...] = ()
    became: tuple[str, ...] = ()
    kernel: str = ""
    deviation: float | None = None
    routing: RoutingReport | None = None


@dataclass
class StepReport:
    """One step of the pipeline: its name, how long it took, and the number of graph nodes after it."""

    name: str
    milliseconds: float
    nodes: int


@dataclass
class GraphReport:
    """One graph handed to the backend.

    Attributes:
        name: Dynamo's compile id, such as ``0/0``.
        nodes_before, nodes_after: sizes of the graph, nested graphs included.
        blocks: MoE blocks found in it.
        steps: time per step of the pipeline.
        break_reason: the graph break that ended it, empty if it ended with the function.
        break_source: ``file:line`` of that break.
        discarded: why the graph is not in use and its frame was traced again (see `samoyeds_compile.capture`); such a
            graph is reported only for blocks that no later graph shows; empty normally.
        kernels: how each block is computed: by which kernel, or why by none.
        collectives: what the graph sends between ranks, in order; rewrites leave it as it is.
        layouts: how rows lie in those that a kernel or a GPU computes.
        problem: what went wrong inside the pipeline, so that the original graph was compiled; None normally.
        dump: folder with the dumped graphs, None if nothing was dumped.
        left_out: what the dump does not have, and why.
    """

    name: str
    nodes_before: int = 0
    nodes_after: int = 0
    blocks: list[BlockReport] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)
    layouts: list[LayoutReport] = field(default_factory=list)
    break_reason: str = ""
    break_source: str = ""
    discarded: str = ""
    collectives: list[str] = field(default_factory=list)
    problem: str | None = None
    dump: str | None = None
    left_out: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything known about one compiled model; pass it as ``options={"report": r}`` and it collects.

    Attributes:
        graphs: one entry for each graph handed to the backend, in order.
        uncaptured: MoE modules of the model that reached no graph (`explain` finds them).
        breaks: graph breaks as (reason, remedy).
        notes: remarks that concern the model as a whole.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    uncaptured: list[BlockReport] = field(default_factory=list)
    breaks: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __call__(self, graph: GraphReport) -> None:
        """Collect one graph; blocks of discarded graphs that it shows again are dropped."""
        again = {block.source for block in graph.blocks}
        for old in (g for g in self.graphs if g.discarded):
            old.blocks = [block for block in old.blocks if block.source not in again]
        self.graphs = [*(g for g in self.graphs if g.blocks or not g.discarded), graph]

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        """The same report: a collector whose options are copied (transformers' `CompileConfig` does) must collect."""
        return self

    @property
    def blocks(self) -> list[BlockReport]:
        """All blocks: those of all graphs, then those that reached none."""
        return [*(b for g in self.graphs for b in g.blocks), *self.uncaptured]

    @property
    def rewritten(self) -> list[BlockReport]:
        """The blocks that run as ``samoyeds::`` ops."""
        return [b for b in self.blocks if b.rewritten]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    def update_dump(self) -> None:
        """Write ``report.json`` and ``report.html`` of what was dumped again, with the routing so far."""
        from samoyeds_compile.report.dump import update_reports

        update_reports(self)

    def why(self) -> str:
        """What could be better, as text: blocks left alone, graph breaks, kernels not used; each with what to do."""
        from samoyeds_compile.report.why import why

        return why(self)

    def __rich__(self) -> RenderableType:
        """Render with rich."""
        from samoyeds_compile.report.table import render

        return render(self)

    def __str__(self) -> str:
        """The rich rendering as plain text; without rich, lines."""
        try:
            from samoyeds_compile.report import table
        except ImportError:
            from samoyeds_compile.report import plain

            return plain.to_text(self)
        return table.to_text(self)

    def __iter__(self) -> Iterator[BlockReport]:
        """Iterate over the blocks."""
        return iter(self.blocks)
