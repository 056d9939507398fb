"""The replacement of a region as a program of its own, lowered as it will be in the user's graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.edit import run_node
from samoyeds_compile.graph.sizes import Size, call_name, mark_sizes, replace_leaves
from samoyeds_compile.graph.values import Value
from samoyeds_compile.lower.stages import lower_experts
from samoyeds_compile.match.region import MoERegion
from samoyeds_compile.rewrite import emit_region

NumberOf = Callable[[Size], int]


def build_replacement(region: MoERegion, inputs: Sequence[Any], number_of: NumberOf) -> Callable[..., Any]:
    """A function of the region's inputs and of what it computes from them (`MoERegion.computed`).

    It interprets the graph, as AOTAutograd does: the code that FX prints for ``(-2.0) ** x`` means another thing.

    Args:
        region: what to replace.
        inputs: real ones; the lowering asks for their sizes.
        number_of: the number for each of `replacement_sizes`.
    """
    graph = _emit(region, inputs)
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            args, kwargs = replace_leaves(_marked(node), Size, number_of)
            node.args, node.kwargs = tuple(args), kwargs
            _fill_example(node)
    module = fx.GraphModule(torch.nn.Module(), graph)
    lower_experts(module)
    interpreter = fx.Interpreter(module)
    interpreter.extra_traceback = False
    return interpreter.run


def replacement_sizes(region: MoERegion) -> list[Size]:
    """Every distinct size in the replacement: in carried subgraphs, derived operands and a view of the result."""
    found: dict[Size, None] = {}
    for node in _emit(region, [value.example for value in given_values(region)]).nodes:
        if node.op in ("call_function", "call_method"):
            replace_leaves(_marked(node), Size, lambda size: found.setdefault(size))
    return list(found)


def given_values(region: MoERegion) -> list[Value]:
    """What a replacement gets."""
    return [*region.inputs, *region.computed]


def _emit(region: MoERegion, examples: Sequence[Any]) -> fx.Graph:
    graph = fx.Graph()
    placeholders = {value: graph.placeholder(f"input_{i}") for i, value in enumerate(given_values(region))}
    for node, example in zip(placeholders.values(), examples, strict=True):
        node.meta["example_value"] = example
    graph.output(emit_region(region, graph, placeholders.__getitem__))
    return graph


def _marked(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    return mark_sizes(call_name(node), node.args, node.kwargs, f"for {node.name}")


def _fill_example(node: fx.Node) -> None:
    """Compute a derived operand; what depends on an op of ours has no example, and needs none."""
    ours = getattr(node.target, "namespace", "") == "samoyeds"
    if not ours and all("example_value" in source.meta for source in node.all_input_nodes):
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
        with torch.no_grad():
            node.meta["example_value"] = run_node(node, tuple(args), dict(kwargs))
