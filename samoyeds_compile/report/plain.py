"""The report where rich is missing, as on machines that are only borrowed to measure: the same facts as lines."""

from __future__ import annotations

from samoyeds_compile.report.model import Report


def to_text(report: Report) -> str:
    """Summary, blocks with what they became or why not, kernels, notes."""
    lines = [f"samoyeds: {len(report.rewritten)} of {len(report.blocks)} MoE blocks rewritten"]
    for block in report.blocks:
        became = ", ".join(block.became) if block.rewritten else f"left as it is: {block.reason}"
        lines.append(f"{block.module or block.source}: {block.family}, {block.activation}, {became}")
    lines += dict.fromkeys(f"experts: {kernel}" for graph in report.graphs for kernel in graph.kernels)
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)]) + "\n"
