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
from samoyeds_compile.graph.edit import (
    copy_origin,
    erase_members,
    fill_examples,
    nodes_between,
    refresh_examples,
    unbacked_symbols,
)
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import sizes_of
from samoyeds_compile.match.region import Carried, Derived, Linear, MoERegion, leaves

FAMILY = "samoyeds_family"
"""Key in ``node.meta`` of the canonical op: the pattern it replaces, which the lowering may consider."""

NodeOf = Callable[[Value], fx.Node]


def rewrite_region(region: MoERegion) -> tuple[str, ...]:
    """Replace the region in its graph; returns the names of the ``samoyeds::`` ops that compute it now."""
    graph, old = region.graph.module.graph, region.output.node
    last = old.prev
    with graph.inserting_before(old):
        new = emit_region(region, graph, lambda value: value.holder)
    added = nodes_between(last, old)
    for node in added:
        copy_origin(region.down.result.node, node)
    if not unbacked_symbols(region.output.holder):
        new.meta["example_value"] = region.output.example
    fill_examples(added)
    for user in region.output.users:
        for read in [node for node, meaning in user.reads.items() if meaning is region.output]:
            user.node.replace_input_with(read, new)
    region.output.holder = new  # a block right behind this one was matched when the old node was there
    erase_members(region.members, region.output)
    refresh_examples(new)
    return tuple(dict.fromkeys(name for name in map(_samoyeds_name, added) if name))


def _samoyeds_name(node: fx.Node) -> str:
    """``samoyeds::op``; empty for other nodes."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else ""
    return name if name.startswith("samoyeds::") else ""


def emit_region(region: MoERegion, graph: fx.Graph, node_of: NodeOf) -> fx.Node:
    """Write the replacement of a region at the graph's insertion point.

    Args:
        region: what to compute.
        graph: where to write it.
        node_of: the node that holds each of the region's inputs in ``graph``.
    """
    emitter = _Emitter(region, graph, node_of)
    if region.offsets is not None:
        return emitter.sorted()
    if region.batched:
        return emitter.batched()
    if region.carried_activation is None and region.carried_post is None:
        return emitter.finished(emitter.canonical())
    return emitter.finished(emitter.stages())


class _Emitter:
    def __init__(self, region: MoERegion, graph: fx.Graph, node_of: NodeOf) -> None:
        self.region, self.graph, self.node_of = region, graph, node_of
        self.made: dict[Derived, fx.Node] = {}

    def operand(self, operand: Any) -> Any:
        """What stands for an operand in the graph; a derived one is written there, once."""
        if isinstance(operand, Value):
            return self.node_of(operand)
        if isinstance(operand, (tuple, list)):
            return type(operand)(self.operand(o) for o in operand)
        if not isinstance(operand, Derived):
            return operand
        if operand not in self.made:
            arguments = tuple(self.operand(a) for a in operand.args)
            keywords = {name: self.operand(v) for name, v in operand.kwargs}
            self.made[operand] = self.call(operand.target, *arguments, **keywords)
        return self.made[operand]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def canonical(self) -> fx.Node:
        region = self.region
        weights = region.expert_weights
        if weights is None:
            weights = Derived(torch.ones_like, (region.expert_ids,), (("dtype", region.up.compute_dtype),))
        node = self.call(
            torch.ops.samoyeds.moe_experts.default,
            self.operand(region.x), self.operand(region.expert_ids), self.operand(weights), *self.projections(),
            region.activation, region.gate_up_layout, region.weight_layout, region.weighting, region.up.compute_dtype,
            region.output.dtype,
        )  # fmt: skip
        node.meta[FAMILY] = region.family
        return node

    def projections(self) -> tuple[Any, ...]:
        """Weights of gate, up and down, then their biases."""
        linears = (self.region.gate, self.region.up, self.region.down)
        return (*map(self.weights, linears), *(None if p is None else self.operand(p.bias) for p in linears))

    def weights(self, linear: Linear | None) -> list[fx.Node]:
        """A stack or the matrices of a projection, all projections stored the same way."""
        nodes = [] if linear is None else [self.node_of(w) for w in linear.weights]
        if linear is None or linear.transposed == self.region.up.transposed:
            return nodes
        return [self.call(torch.transpose, node, -2, -1) for node in nodes]

    def sorted(self) -> fx.Node:
        region, stored = self.region, map(self.weights, (self.region.gate, self.region.up, self.region.down))
        return self.call(
            torch.ops.samoyeds.experts_sorted.default,
            self.operand(region.x), self.operand(region.offsets), *stored, region.activation, region.gate_up_layout,
            region.weight_layout, region.up.compute_dtype, region.output.dtype,
        )  # fmt: skip

    def batched(self) -> fx.Node:
        region, source, axis = self.region, self.region.x, self.region.expert_axis
        assert isinstance(source, Value)
        rows = self.node_of(source)
        first = self.call(torch.movedim, rows, axis, 0) if axis else rows
        several = len(source.shape) > 3
        out = self.call(
            torch.ops.samoyeds.experts_batched.default,
            self.call(torch.flatten, first, 1, -2) if several else first, *self.projections(), region.activation,
            region.gate_up_layout, region.weight_layout, region.up.compute_dtype, region.output.dtype,
        )  # fmt: skip
        out = self.call(torch.Tensor.view_as, out, first) if several else out
        return self.call(torch.movedim, out, 0, axis) if axis else out

    def stages(self) -> fx.Node:
        region, ops, dtype = self.region, torch.ops.samoyeds, self.region.up.compute_dtype
        weights = self.operand(region.expert_weights)
        plan = emit_plan(self.graph, self.operand(region.expert_ids), region.num_experts)
        order, slot, expert, offsets = plan
        carried = region.carried_activation is not None
        h = self.call(
            ops.expert_up.default, self.operand(region.x), *plan, [], self.weights(region.up), None,
            self.operand(region.up.bias), None, expr.IDENTITY if carried else region.activation,
            "none" if carried else region.gate_up_layout, region.weight_layout, dtype,
        )  # fmt: skip
        h = _emit_carried(region.carried_activation, self.graph, h, self.node_of)
        down = self.weights(region.down), self.operand(region.down.bias)
        if region.carried_post is None:
            return self.call(
                ops.expert_down.default, h, *plan, *down, weights, region.weight_layout, dtype, region.output.dtype
            )
        y = self.call(ops.expert_project.default, h, expert, offsets, *down, region.weight_layout, dtype)
        y = _emit_carried(region.carried_post, self.graph, y, self.node_of)
        return self.call(ops.combine.default, y, order, slot, offsets, weights, region.output.dtype)

    def finished(self, out: fx.Node) -> fx.Node:
        """The rows [T, H] in the shape of the output, and what they are added to."""
        region = self.region
        if len(region.output.shape) != 2:
            tokens = next(leaves(region.x))
            alike = sizes_of(tokens)[:-1] == sizes_of(region.output)[:-1]
            out = (
                self.call(torch.Tensor.view_as, out, self.node_of(tokens))
                if alike
                else self.call(torch.reshape, out, _shape_argument(region.output))
            )
        return out if region.base is None else self.call(torch.add, self.node_of(region.base), out)


def _shape_argument(value: Value) -> tuple[int, ...]:
    """The shape of a value; a symbolic size, of which there is one at most, is left to be computed."""
    return tuple(size if isinstance(size, int) else -1 for size in sizes_of(value))


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
