"""`MoERegion` -> canonical ``samoyeds::moe_experts``.

A region with a part that has no name in the canonical op (an activation with parameters of its own, a norm between
the second projection and the routing weights) is written with the stage ops instead, that part standing between them
as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx

from samoyeds_codegen import expr
from samoyeds_compile.graph.edit import copy_origin, erase_members, fill_examples, nodes_between
from samoyeds_compile.graph.sizes import replace_leaves
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import Carried, Derived, MoERegion, Operand

FAMILY = "samoyeds_family"
"""Key in ``node.meta`` of the canonical op: the pattern it replaces, which the lowering may consider."""

NodeOf = Callable[[Value], fx.Node]


def rewrite_region(region: MoERegion) -> fx.Node:
    """Replace the region in its graph; returns the node that now computes its output."""
    graph, old = region.graph.module.graph, region.output.node
    last = old.prev
    with graph.inserting_before(old):
        new = emit_region(region, graph, lambda value: value.holder)
    added = nodes_between(last, old)
    for node in added:
        copy_origin(region.down.result.node, node)
    new.meta["example_value"] = old.meta.get("example_value")
    fill_examples(added)
    old.replace_all_uses_with(new)
    erase_members(region.members, region.output)
    return new


def emit_region(region: MoERegion, graph: fx.Graph, node_of: NodeOf) -> fx.Node:
    """Write the replacement of a region at the graph's insertion point.

    Args:
        region: what to compute.
        graph: where to write it.
        node_of: the node that holds each of the region's inputs in ``graph``.
    """
    if region.carried_activation is None and region.carried_post is None:
        return _emit_canonical(region, graph, node_of)
    return _emit_stages(region, graph, node_of)


def operand_node(operand: Operand | None, graph: fx.Graph, node_of: NodeOf) -> fx.Node | None:
    """The node that holds an operand; what the graph does not hold yet is added at its insertion point."""
    if operand is None:
        return None
    if isinstance(operand, Value):
        return node_of(operand)

    def emit(argument: Any) -> Any:
        return operand_node(argument, graph, node_of)

    args, kwargs = replace_leaves((operand.args, dict(operand.kwargs)), (Value, Derived), emit)
    return graph.call_function(operand.target, args, kwargs)


def _emit_canonical(region: MoERegion, graph: fx.Graph, node_of: NodeOf) -> fx.Node:
    def optional(operand: Operand | None) -> fx.Node | None:
        return operand_node(operand, graph, node_of)

    args = (
        optional(region.x), optional(region.expert_ids), optional(region.expert_weights),
        None, node_of(region.up.weights[0]), node_of(region.down.weights[0]),
        None, optional(region.up.bias), optional(region.down.bias),
        region.activation, region.gate_up_layout, region.weight_layout, region.up.compute_dtype, region.output.dtype,
    )  # fmt: skip
    node = graph.call_function(torch.ops.samoyeds.moe_experts.default, args)
    node.meta[FAMILY] = region.family
    return node


def _emit_stages(region: MoERegion, graph: fx.Graph, node_of: NodeOf) -> fx.Node:
    def optional(operand: Operand | None) -> fx.Node | None:
        return operand_node(operand, graph, node_of)

    ops, dtype = torch.ops.samoyeds, region.up.compute_dtype
    weights, expert_ids = optional(region.expert_weights), optional(region.expert_ids)
    assert expert_ids is not None
    plan = emit_plan(graph, expert_ids, region.num_experts)
    activation = region.activation if region.carried_activation is None else expr.IDENTITY
    layout = region.gate_up_layout if region.carried_activation is None else "none"
    h = graph.call_function(ops.expert_up.default, (
        optional(region.x), *plan, None, node_of(region.up.weights[0]), None, optional(region.up.bias), activation,
        layout, region.weight_layout, dtype))  # fmt: skip
    h = _emit_carried(region.carried_activation, graph, h, node_of)
    down = (h, *plan, node_of(region.down.weights[0]), optional(region.down.bias))
    if region.carried_post is None:
        return graph.call_function(
            ops.expert_down.default, (*down, weights, region.weight_layout, dtype, region.output.dtype)
        )
    y = graph.call_function(ops.expert_down.default, (*down, None, region.weight_layout, dtype, None))
    y = _emit_carried(region.carried_post, graph, y, node_of)
    order, slot, _, offsets = plan
    return graph.call_function(ops.combine.default, (y, order, slot, offsets, weights, region.output.dtype))


def emit_plan(graph: fx.Graph, expert_ids: fx.Node, num_experts: int) -> tuple[fx.Node, ...]:
    """``route`` and its four results, named so that a dumped graph can be read."""
    plan = graph.create_node("call_function", torch.ops.samoyeds.route.default, (expert_ids, num_experts), name="plan")
    names = ("order", "slot", "expert", "offsets")
    return tuple(graph.create_node("call_function", getitem, (plan, i), name=name) for i, name in enumerate(names))


def _emit_carried(carried: Carried | None, graph: fx.Graph, source: fx.Node, node_of: NodeOf) -> fx.Node:
    """Copy a carried subgraph behind ``source``."""
    if carried is None:
        return source
    copies: dict[Value, fx.Node] = {carried.source: source}
    for value in carried.values:
        reads: dict[fx.Node, Value] = value.reads

        def substitute(node: fx.Node, reads: dict[fx.Node, Value] = reads) -> Any:
            meaning = reads[node]
            return copies[meaning] if meaning in copies else node_of(meaning)

        args, kwargs = fx.map_arg((value.node.args, value.node.kwargs), substitute)
        copies[value] = graph.create_node(value.node.op, value.node.target, tuple(args), dict(kwargs))
    return copies[carried.result]
