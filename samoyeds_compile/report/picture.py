"""The picture of a graph: its modules as boxes in the order in which they run, blocks as boxes of their own."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from samoyeds_compile.graph.edit import BLOCK
from samoyeds_compile.report.nodes import is_parameter, label, path_of, shape_text

MOST_BOXES = 1500
"""Boxes of one picture; what a larger graph has beyond them is left out, which the picture says."""
_SILENT = frozenset(("placeholder", "output", "get_attr"))


def picture(graphs: Sequence[fx.GraphModule]) -> dict[str, Any]:
    """Boxes and the edges between them, as plain data.

    Nodes in a row that belong to one module make a box. A block is one box, at the place of its last node: everything
    it reads is computed before, everything that reads it after.
    """
    boxes: list[dict[str, Any]] = []
    edges: dict[tuple[int, int], str] = {}
    for graph in graphs:
        of = _boxes(graph, boxes)
        for node, box in of.items():
            for source in node.all_input_nodes:
                if of.get(source, box) != box:
                    edges.setdefault((of[source], box), shape_text(source.meta.get("example_value")))
    # What touches nothing (an assertion, a hook that logs) would only be in the way.
    joined = {box for pair in edges for box in pair} or {*range(len(boxes))}
    number = {box: i for i, box in enumerate(sorted(joined))}
    boxes = [boxes[box] for box in number]
    edges = {(number[a], number[b]): shape for (a, b), shape in edges.items()}
    left_out = max(0, len(boxes) - MOST_BOXES)
    kept = [[*pair, shape] for pair, shape in edges.items() if max(pair) < MOST_BOXES]
    shown = [{**box, "ops": _most(box["ops"])} for box in boxes[:MOST_BOXES]]
    return {"boxes": shown, "edges": kept, "left_out": left_out}


def _boxes(graph: fx.GraphModule, boxes: list[dict[str, Any]]) -> dict[fx.Node, int]:
    """Add the boxes of one graph; returns the box of each node."""
    of: dict[fx.Node, int] = {}
    current: Any = None
    for key, nodes in _runs(graph):
        if key != current:
            boxes.append({"label": key[0], "block": key[1], "nodes": 0, "ops": Counter()})
            current = key
        boxes[-1]["nodes"] += len(nodes)
        boxes[-1]["ops"].update(map(label, nodes))
        of |= dict.fromkeys(nodes, len(boxes) - 1)
    return of


def _runs(graph: fx.GraphModule) -> Iterator[tuple[tuple[str, int | None], list[fx.Node]]]:
    """((path, block), nodes) in order; all nodes of a block come together."""
    members: dict[int, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if BLOCK in node.meta:
            members.setdefault(node.meta[BLOCK], []).append(node)
    last = {nodes[-1]: (block, nodes) for block, nodes in members.items()}
    for node in graph.graph.nodes:
        if node in last:
            block, nodes = last[node]
            yield (path_of(node), block), nodes
        elif BLOCK not in node.meta and node.op not in _SILENT:
            yield (_group(path_of(node)), None), [node]
        elif node.op == "placeholder" and not is_parameter(node):
            yield ("inputs", None), [node]


@functools.lru_cache(4096)
def _group(path: str) -> str:
    """The part of a path that names a box: a layer and what is directly in it."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 2])


def _most(ops: Counter[str]) -> list[str]:
    return [f"{name} ×{count}" if count > 1 else name for name, count in ops.most_common(4)]
