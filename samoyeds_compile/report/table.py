"""The report as rich tables."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from samoyeds_compile.report.layouts import LayoutReport
from samoyeds_compile.report.model import BlockReport, Report


def render(report: Report) -> RenderableType:
    """Summary, blocks, what was not rewritten and why, graph breaks, time per step."""
    parts: list[RenderableType] = [_summary(report)]
    if report.blocks:
        parts.append(_blocks(report))
    if any(not b.rewritten for b in report.blocks):
        parts.append(_reasons(report))
    if report.breaks:
        parts.append(_breaks(report))
    if report.graphs:
        parts.append(_steps(report))
    kernels = dict.fromkeys(kernel for graph in report.graphs for kernel in graph.kernels)
    parts += [Text(f"experts: {kernel}") for kernel in kernels]
    parts += map(_layouts, {layout.summary: layout for graph in report.graphs for layout in graph.layouts}.values())
    parts += [Text(f"routing of {b.module or b.source}: {b.routing}") for b in report.blocks if b.routing is not None]
    parts += [Text(f"note: {note}") for note in report.notes]
    return Group(*parts)


def to_text(report: Report, width: int = 140) -> str:
    """The same without colours, for logs and ``print``."""
    text = io.StringIO()
    Console(width=width, force_terminal=False, color_system=None, file=text).print(render(report))
    return text.getvalue()


def _layouts(layout: LayoutReport) -> Table:
    table = Table(title=layout.summary, title_justify="left")
    for name in ("regime", "tokens", "edge", "layout", "us", "runner-up", "margin, us"):
        table.add_column(name, overflow="fold", justify="right" if "us" in name else "left")
    for regime in layout.regimes:
        for number, edge in enumerate(regime.edges):
            first = ("", "") if number else (regime.title, regime.tokens_text)
            read = f" to {edge.read}" if edge.read else ""
            margin = f"{edge.margin:.1f}" if edge.runner_up else ""
            table.add_row(*first, edge.edge, edge.layout + read, f"{edge.microseconds:.1f}", edge.runner_up, margin)
    return table


def _summary(report: Report) -> Text:
    total, done = len(report.blocks), len(report.rewritten)
    if not total:
        return Text(
            f"samoyeds: no MoE block found in {len(report.graphs)} graph(s); everything runs on the base compiler"
        )
    style = "green" if done == total else "yellow"
    return Text(f"samoyeds: {done} of {total} MoE blocks rewritten in {len(report.graphs)} graph(s)", style=style)


def _blocks(report: Report) -> Table:
    table = Table(title="MoE blocks", title_justify="left")
    for name in ("graph", "module", "family", "E, K, H, I", "activation", "weights", "router", "became"):
        table.add_column(name, overflow="fold")
    for graph in report.graphs:
        for block in graph.blocks:
            table.add_row(graph.name, *_block_row(block))
    for block in report.uncaptured:
        table.add_row("none", *_block_row(block))
    return table


def _block_row(block: BlockReport) -> list[str | Text]:
    sizes = [block.experts, block.top_k, block.hidden_size, block.intermediate_size]
    shape = ", ".join(str(size) for size in sizes if size is not None)
    weights = ", ".join(filter(None, [block.weight_layout, block.gate_up_layout]))
    became = Text(", ".join(block.became), style="green") if block.rewritten else Text("left as it is", style="yellow")
    router = f"{block.router} (fused)" if block.router_fused else block.router
    return [block.module or block.source, block.family, shape, Text(block.activation), weights, router, became]


def _reasons(report: Report) -> Table:
    table = Table(title="Not rewritten", title_justify="left")
    for name in ("module", "nearest pattern", "why", "where", "what to do"):
        table.add_column(name, overflow="fold")
    for block in report.blocks:
        if not block.rewritten:
            where = block.reason_source or block.source
            why = (block.reason or "").removesuffix(block.remedy).removesuffix("; ").removesuffix(": ")
            table.add_row(block.module, block.family, Text(why), Text(where), Text(block.remedy))
    return table


def _breaks(report: Report) -> Table:
    table = Table(title="Graph breaks", title_justify="left")
    table.add_column("reason", overflow="fold")
    table.add_column("remedy", overflow="fold")
    for reason, remedy in report.breaks:
        table.add_row(Text(reason), Text(remedy))
    return table


def _steps(report: Report) -> Table:
    names = list(dict.fromkeys(s.name for g in report.graphs for s in g.steps))
    table = Table(title="Graphs, and milliseconds per step", title_justify="left")
    for name in ("graph", "nodes", "blocks", *names):
        table.add_column(name, justify="right")
    for graph in report.graphs:
        times = {s.name: s.milliseconds for s in graph.steps}
        row = [graph.name, f"{graph.nodes_before} -> {graph.nodes_after}", str(len(graph.blocks))]
        table.add_row(*row, *(f"{times[n]:.1f}" if n in times else "" for n in names))
    return table
