"""What the report shows of each block: its lines in the model, its operations before and after."""

from __future__ import annotations

import linecache
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from samoyeds_compile.graph.edit import BLOCK
from samoyeds_compile.report.nodes import call_text, label, line_of, shape_text, short_name

MOST_OPERATIONS = 240
"""Operations of a block that are shown; a loop over many experts has thousands that are alike."""
AROUND, GAP = 2, 8
"""Lines shown around those that a block comes from, and the largest gap that is shown rather than cut."""

Lines = list[tuple[str, int]]


def operations(graphs: Sequence[fx.GraphModule]) -> dict[int, dict[str, Any]]:
    """The operations of each block, by its index, as plain data."""
    found: dict[int, list[fx.Node]] = {}
    for graph in graphs:
        for node in graph.graph.nodes:
            if BLOCK in node.meta:
                found.setdefault(node.meta[BLOCK], []).append(node)
    return {block: _listed(nodes) for block, nodes in found.items()}


def _listed(nodes: list[fx.Node]) -> dict[str, Any]:
    shown = nodes[:MOST_OPERATIONS]
    index = {node: i for i, node in enumerate(shown)}
    return {
        "operations": [_operation(node, index) for node in shown],
        "left_out": len(nodes) - len(shown),
        "lines": sorted({line for node in nodes if (line := line_of(node)) is not None}),
    }


def _operation(node: fx.Node, index: dict[fx.Node, int]) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": label(node),
        "text": call_text(node),
        "shape": shape_text(node.meta.get("example_value")),
        "line": line_of(node),
        "reads": [index[source] for source in node.all_input_nodes if source in index],
        "from": [
            (short_name(source), shape_text(source.meta.get("example_value")))
            for source in node.all_input_nodes
            if source not in index
        ],
    }


def passages(lines: Lines) -> Iterator[dict[str, Any]]:
    """The passages of the model's files that hold the lines: file, first line, text, which lines are meant."""
    for file, _ in Counter(file for file, _ in lines).most_common():
        hits = sorted(line for other, line in lines if other == file)
        text = [line.rstrip("\n") for line in linecache.getlines(file)]
        for cluster in _clusters(hits) if text else ():
            first, last = max(1, cluster[0] - AROUND), min(len(text), cluster[-1] + AROUND)
            yield {"file": file, "first": first, "text": text[first - 1 : last], "hits": cluster}


def _clusters(hits: list[int]) -> list[list[int]]:
    clusters = [hits[:1]]
    for line in hits[1:]:
        if line - clusters[-1][-1] > GAP:
            clusters.append([])
        clusters[-1].append(line)
    return clusters
