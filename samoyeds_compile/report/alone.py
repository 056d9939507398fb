"""One block as a program of its own: the original and its replacement, on the inputs of the block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.extract import Fragment, Ref, extract
from samoyeds_compile.graph.sizes import Size, replace_leaves
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import MoERegion, leaves
from samoyeds_compile.report.program import fill, imports, input_of, readable
from samoyeds_compile.rewrite import emit_region


def block_program(region: MoERegion, number: int, folder: str, module: str) -> str:
    """The program; run it to compare both.

    Args:
        region: before it is rewritten.
        number: index of the block in the report of its graph.
        folder: name of the graph's folder.
        module: path of the block's module.

    Raises:
        ValueError: the block reads what is no part of it, or sizes that are known only when it runs.
    """
    before, after = _module(region, _original), _module(region, _replacement)
    texts = [readable(before).replace("GraphModule", "Before", 1), readable(after).replace("GraphModule", "After", 1)]
    lines = {line for gm, text in zip((before, after), texts, strict=True) for line in imports(gm, text)}
    where = f" ({module})" if module else ""
    inputs = "\n".join(f"        {text}," for text in _inputs(region))
    names = {"before": texts[0], "after": texts[1], "imports": "\n".join(sorted(lines))}
    return fill("region", number=number, where=where, folder=folder, inputs=inputs, **names)


def _module(region: MoERegion, write: Any) -> fx.GraphModule:
    """The graph that ``write`` gives for the inputs of the region, in the region's autocast."""
    graph = fx.Graph()
    given = [graph.placeholder(f"{value.node.name[-40:]}_{i}") for i, value in enumerate(region.inputs)]
    contexts = [graph.call_function(torch.amp.autocast_mode._enter_autocast, c) for c in region.output.context.autocast]
    result = write(region, graph, given)
    for context in reversed(contexts):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (context,))
    graph.output(result)
    return fx.GraphModule(torch.nn.Module(), graph)


def _original(region: MoERegion, graph: fx.Graph, given: Sequence[fx.Node]) -> fx.Node:
    return _copy(extract([*region.prologue, *region.members], region.inputs, region.output), graph, given)


def _replacement(region: MoERegion, graph: fx.Graph, given: Sequence[fx.Node]) -> fx.Node:
    node_of: dict[Value, fx.Node] = dict(zip(region.inputs, given, strict=True))
    for value in region.computed:
        node_of[value] = _copy(extract(region.prologue, region.inputs, value), graph, given)
    return emit_region(region, graph, node_of.__getitem__)


def _copy(fragment: Fragment, graph: fx.Graph, given: Sequence[fx.Node]) -> fx.Node:
    """Write a program into a graph, with the sizes that were recorded."""
    made = list(given)

    def real(argument: Any) -> Any:
        return made[argument.index] if isinstance(argument, Ref) else argument.number

    for step in fragment.steps:
        node = step.value.node
        args, kwargs = replace_leaves((step.args, step.kwargs), (Ref, Size), real)
        made.append(graph.create_node(node.op, node.target, tuple(args), dict(kwargs), name=node.name))
        made[-1].stack_trace = node.stack_trace
    return made[fragment.output.index]


def _inputs(region: MoERegion) -> Iterator[str]:
    """Calls that make the inputs; ids name experts that exist."""
    ids = set(leaves(region.expert_ids)) - set(region.flags)
    for value in region.inputs:
        below = region.num_experts if value in ids else 2
        example = value.example
        plain = example.detach() if isinstance(example, torch.Tensor) and type(example) is torch.Tensor else example
        yield input_of(plain, plain, below)
