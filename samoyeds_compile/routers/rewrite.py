"""`RouterRegion` -> ``samoyeds::router``."""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem

import torch
from torch import fx

from samoyeds_compile.graph.edit import copy_origin, nodes_between
from samoyeds_compile.graph.values import Value
from samoyeds_compile.routers.region import RouterRegion


def rewrite_router(router: RouterRegion) -> None:
    """Put the op where the top-k stands: its operands exist there, and nothing reads the results before."""
    at = router.topk.node
    graph, last = at.graph, at.prev
    with graph.inserting_before(at):
        results = emit_router(router, graph, lambda value: value.holder)
    for node in nodes_between(last, at):
        copy_origin(at, node)
    members = {member.node for member in router.members}
    for old, new in zip((router.weights, router.ids), results, strict=True):
        new.meta["example_value"] = old.example
        for node in {old.node, old.holder}:
            node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in members)
    results[0].args[0].meta["example_value"] = (router.weights.example, router.ids.example)  # type: ignore[union-attr]
    for member in reversed(router.members):
        graph.erase_node(member.node)


def emit_router(router: RouterRegion, graph: fx.Graph, node_of: Callable[[Value], fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Write the op at the graph's insertion point; returns the nodes of the weights and the ids."""
    bias = None if router.bias is None else node_of(router.bias)
    arguments = (node_of(router.logits), bias, *router.spec.arguments)
    both = graph.create_node("call_function", torch.ops.samoyeds.router.default, arguments, name="router")
    weights = graph.create_node("call_function", getitem, (both, 0), name="routing_weights")
    ids = graph.create_node("call_function", getitem, (both, 1), name="expert_ids")
    return weights, ids
