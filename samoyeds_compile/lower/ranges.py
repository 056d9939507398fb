"""A range of the profiler around each rewritten block, named by its module and its kernel (``profile_ranges``)."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import fx

from samoyeds_compile.graph.edit import BLOCK, copy_origin, fill_examples, nodes_between
from samoyeds_compile.report.model import BlockReport


def add_ranges(module: fx.GraphModule, blocks: Sequence[BlockReport]) -> None:
    """Put the ops of each block of one GraphModule, lowered, between `range_enter` and `range_exit`.

    Args:
        module: what to change.
        blocks: the graph's report, which nodes refer to.
    """
    members: dict[int, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if _is_ours(node) and BLOCK in node.meta:
            members[node.meta[BLOCK]].append(node)
    for block, nodes in members.items():
        _surround(nodes, range_name(blocks[block]))


def range_name(block: BlockReport) -> str:
    """Such as ``model.layers.3.mlp.experts: kernel of dense experts, ...``."""
    kernel = block.kernel or ", ".join(block.became)
    return f"{block.module or block.source}: {kernel}"


def _is_ours(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "samoyeds"


def _surround(nodes: Sequence[fx.Node], name: str) -> None:
    first, last = nodes[0], nodes[-1]
    read = next((n for n in first.all_input_nodes if _is_tensor(n)), None)
    if read is None or not _is_tensor(last):
        return
    graph, before, after, ops = first.graph, first.prev, last.next, torch.ops.samoyeds
    with graph.inserting_before(first):
        entered = graph.call_function(ops.range_enter.default, (read, name))
        copy, handle = (graph.call_function(operator.getitem, (entered, i)) for i in range(2))
    with graph.inserting_before(after):
        left = graph.call_function(ops.range_exit.default, (last, handle))
    added = [*nodes_between(before, first), left]
    for node in added:
        copy_origin(first, node)
    fill_examples(added)
    first.replace_input_with(read, copy)
    last.replace_all_uses_with(left, delete_user_cb=lambda user: user is not left)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)
