"""What ``report.html`` shows of one graph, as plain data, collected while the graph is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx

from samoyeds_compile.graph.edit import BLOCK
from samoyeds_compile.graph.source import source_name
from samoyeds_compile.graph.values import graph_modules
from samoyeds_compile.report.model import BlockReport, GraphReport
from samoyeds_compile.report.nodes import is_parameter
from samoyeds_compile.report.pattern import pattern_of
from samoyeds_compile.report.picture import picture
from samoyeds_compile.report.regions import operations as operations_of
from samoyeds_compile.report.regions import passages
from samoyeds_compile.sparsity.tensor import PackedTensor

MOST_PATTERNS = 24
"""Pictures of weights in one graph; layers look alike."""


class View:
    """Collects what is shown of one graph.

    Attributes:
        kernels: for each block how it is computed, and the files with the text.
        programs: for each block the one whose program runs it alone: itself, or one that is alike.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        given = zip(placeholders, example_inputs, strict=True)
        self._packed = {node.name: weight for node, weight in given if isinstance(weight, PackedTensor)}
        self._before: dict[int, dict[str, Any]] = {}
        self._picture: dict[str, Any] = {}
        self.kernels: dict[int, dict[str, Any]] = {}
        self.programs: dict[int, int] = {}

    def found(self, gm: fx.GraphModule) -> None:
        """Look at the graph with its blocks marked, before anything is rewritten."""
        graphs = graph_modules(gm)
        self._picture, self._before = picture(graphs), operations_of(graphs)

    def finished(self, gm: fx.GraphModule, report: GraphReport) -> dict[str, Any]:
        """All that is shown."""
        after = operations_of(graph_modules(gm))
        table: list[dict[str, Any]] = []
        blocks = [self._block(i, block, after, table) for i, block in enumerate(report.blocks)]
        patterns = self._patterns(gm)
        for i, block in enumerate(blocks):
            block["patterns"] = [pattern for pattern, owner in patterns if owner == i]
        return {"picture": self._picture, "passages": table, "blocks": blocks}

    def _block(self, i: int, block: BlockReport, after: dict[int, Any], table: list[dict[str, Any]]) -> dict[str, Any]:
        before = self._before.get(i, {"operations": [], "left_out": 0, "lines": []})
        replaced = after.get(i) if block.rewritten else None
        named = () if block.rewritten else (block.reason_source, block.source)
        lines = sorted({*before["lines"], *filter(None, map(_place, named))})
        return {
            "before": before,
            "after": replaced,
            "passages": [_index(table, passage) for passage in passages(lines)],
            "reason_at": _place(block.reason_source),
            "kernel": self.kernels.get(i),
            "program": self.programs.get(i) if block.rewritten else None,
        }

    def _patterns(self, gm: fx.GraphModule) -> list[tuple[dict[str, Any], int]]:
        """Pictures of packed weights with the block that reads each."""
        return list(self._pictures(gm))[:MOST_PATTERNS]

    def _pictures(self, gm: fx.GraphModule) -> Iterator[tuple[dict[str, Any], int]]:
        for node in gm.graph.find_nodes(op="placeholder"):
            owner = next((user.meta[BLOCK] for user in node.users if BLOCK in user.meta), None)
            if node.name in self._packed and owner is not None and is_parameter(node):
                pattern = pattern_of(self._packed[node.name], source_name(node) or node.name)
                if pattern is not None:
                    yield pattern, owner


def _index(table: list[dict[str, Any]], passage: dict[str, Any]) -> int:
    """Where a passage stands in the table; layers of a model share theirs."""
    if passage not in table:
        table.append(passage)
    return table.index(passage)


def _place(text: str) -> Any:
    """(file, line) of ``file:line: code``; None where there is none."""
    file, _, rest = text.partition(":")
    number = rest.partition(":")[0]
    return (file, int(number)) if number.isdigit() else None
