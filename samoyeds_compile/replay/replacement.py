"""The replacement of a region as a program of its own, lowered as it will be in the user's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.edit import run_node
from samoyeds_compile.graph.sizes import Size, call_name, mark_sizes, replace_leaves
from samoyeds_compile.lower.stages import lower_experts
from samoyeds_compile.match.region import MoERegion
from samoyeds_compile.rewrite import emit_region


def build_replacement(region: MoERegion, inputs: Sequence[Any], number_of: Callable[[Size], int]) -> fx.GraphModule:
    """A module that takes the region's inputs.

    Args:
        region: what to replace.
        inputs: real inputs; the lowering asks for their sizes.
        number_of: the number for each size in a carried subgraph or a derived operand.
    """
    graph = fx.Graph()
    placeholders = {value: graph.placeholder(f"input_{i}") for i, value in enumerate(region.inputs)}
    for node, given in zip(placeholders.values(), inputs, strict=True):
        node.meta["example_value"] = given
    graph.output(emit_region(region, graph, placeholders.__getitem__))
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            node.args, node.kwargs = _resized(node, number_of)
            _fill_example(node)
    module = fx.GraphModule(torch.nn.Module(), graph)
    lower_experts(module)
    module.recompile()
    return module


def _resized(node: fx.Node, number_of: Callable[[Size], int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = replace_leaves(mark_sizes(call_name(node), node.args, node.kwargs), Size, number_of)
    return tuple(args), kwargs


def _fill_example(node: fx.Node) -> None:
    """Compute a derived operand; what depends on an op of ours has no example, and needs none."""
    ours = getattr(node.target, "namespace", "") == "samoyeds"
    if not ours and all("example_value" in source.meta for source in node.all_input_nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        with torch.no_grad():
            node.meta["example_value"] = run_node(node, tuple(args), dict(kwargs))
