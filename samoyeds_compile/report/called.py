"""Blocks that reached the graph as ops of ours, because an integration calls them: nothing is left to match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from samoyeds_codegen import expr
from samoyeds_compile.graph.source import module_path, source_line, source_name
from samoyeds_compile.graph.values import ValueGraph
from samoyeds_compile.report.model import BlockReport
from samoyeds_compile.report.nodes import is_parameter

INTEGRATION, LEAF = "integration", "leaf"
"""Families of such blocks: written with ``moe_experts`` or its stages, and kept opaque."""

_OPAQUE = (
    "runs as it is, opaque to the compiler; describe its weights to `samoyeds_compile.moe_experts` to have it rewritten"
)


def called_blocks(graphs: Sequence[ValueGraph]) -> list[tuple[fx.Node, BlockReport]]:
    """The ops of ours that the captured graphs call, each with its entry in the report."""
    ops = torch.ops.samoyeds
    makers = {ops.moe_experts.default: _entry, ops.expert_up.default: _entry, ops.leaf.default: _leaf}
    nodes = [node for view in graphs for node in view.module.graph.nodes if node.op == "call_function"]
    return [(node, makers[node.target](node)) for node in nodes if node.target in makers]


def _entry(node: fx.Node) -> BlockReport:
    """The entry of ``moe_experts``, or of the first of the two stages that stand for it."""
    operands = _operands(node)
    up, ids = _first(operands["up"]), operands.get("expert_ids", operands.get("slot"))
    rows = 2 if operands["weight_layout"] == "in_out" else 1
    packed = 2 if operands["gate_up_layout"] in ("concatenated", "interleaved") else 1
    return BlockReport(
        module=module_path([node]),
        source=source_line(node),
        family=INTEGRATION,
        rewritten=True,
        experts=_experts(operands["up"]),
        top_k=_size(ids, 1),
        hidden_size=_size(operands["x"], 1),
        intermediate_size=up.shape[rows - 3] // packed,
        activation=expr.display_name(operands["activation"]),
        gate_up_layout=operands["gate_up_layout"],
        weight_layout=operands["weight_layout"],
        parameters=_parameters([operands.get(name) for name in ("gate", "up", "down")]),
        became=(str(node.target).removesuffix(".default"),),
    )


def _leaf(node: fx.Node) -> BlockReport:
    parameters = _parameters(list(_operands(node).values()))
    return BlockReport(
        module_path([node]), source_line(node), LEAF, rewritten=False, reason=_OPAQUE, parameters=parameters
    )


def _parameters(operands: list[Any]) -> tuple[str, ...]:
    """Names of the parameters among operands, those that were stacked for the call included."""
    nodes: list[fx.Node] = []
    fx.map_arg(operands, nodes.append)
    nodes += [source for node in nodes for source in node.all_input_nodes]
    return tuple(dict.fromkeys(source_name(node) for node in nodes if is_parameter(node) and source_name(node)))


def _operands(node: fx.Node) -> dict[str, Any]:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _first(weights: Any) -> torch.Tensor:
    """An operand's first matrix or stack; an operand is a tensor or a list of them."""
    node = weights[0] if isinstance(weights, Sequence) else weights
    value: torch.Tensor = node.meta["example_value"]
    return value


def _experts(weights: Any) -> int:
    apart = isinstance(weights, Sequence) and len(weights) > 1
    return len(weights) if apart else int(_first(weights).shape[0])


def _size(node: Any, dim: int) -> int:
    return int(node.meta["example_value"].shape[dim])
