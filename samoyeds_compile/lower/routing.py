"""A count of slots beside each rewritten block, by expert (``record_routing``)."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import EphemeralSource

from samoyeds_compile.graph.edit import BLOCK, copy_origin
from samoyeds_compile.report.model import BlockReport
from samoyeds_compile.report.routing import LiveRouting

_COUNTS = "samoyeds_slots_{}"
"""Name of a block's buffer."""


def add_counters(gm: fx.GraphModule, blocks: Sequence[BlockReport]) -> None:
    """Put `count_slots` before each block, not lowered yet, that routes tokens by their ids.

    The counts are a buffer of the module, which the block's report reads; they live as long as either of them. Bodies
    of checkpoints count, too; other nested graphs may not write to what is theirs, and do not.

    Args:
        gm: what to change, nested graphs included.
        blocks: the graph's report, which nodes refer to.
    """
    for path, module in _counting(gm):
        for node in [*module.graph.nodes]:
            ids, index = _ids_of(node), node.meta.get(BLOCK)
            block = None if index is None else blocks[index]
            if ids is None or block is None or block.routing is not None or block.experts is None:
                continue
            name = _COUNTS.format(index)
            counts_E = _count(module, node, name, ids, block.experts)
            _name_source(gm, f"{path}.{name}".lstrip("."))
            block.routing = LiveRouting(counts_E)


def counters(gm: fx.GraphModule) -> dict[str, int]:
    """The buffers that were added, nested graphs included: name and number of experts."""
    prefix = _COUNTS.format("")
    found = ((path.rpartition(".")[2], buffer) for path, buffer in gm.named_buffers())
    return {name: buffer.numel() for name, buffer in found if name.startswith(prefix)}


def _counting(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """The module and the bodies of its checkpoints, each with its path."""
    yield "", gm
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint):
        name = str(node.args[0].target)
        for path, body in _counting(gm.get_submodule(name)):  # type: ignore[arg-type]
            yield f"{name}.{path}".rstrip("."), body


def _name_source(gm: fx.GraphModule, name: str) -> None:
    """AOTAutograd asks where each buffer of a graph of Dynamo's comes from: this one from nowhere in the model."""
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = EphemeralSource(name)


def _ids_of(node: fx.Node) -> fx.Node | None:
    """The ids [T, K] that a canonical op reads, or `expert_up` by its plan; None for every other node."""
    ops = torch.ops.samoyeds
    if node.target == ops.moe_experts.default:
        return _operand(node, "expert_ids")
    if node.target != ops.expert_up.default:
        return None
    order = _operand(node, "order")
    plan = order.args[0] if order is not None and order.target is operator.getitem else None
    made = isinstance(plan, fx.Node) and plan.target == ops.route.default
    return _operand(plan, "expert_ids") if made else None


def _operand(node: Any, name: str) -> fx.Node | None:
    names = [argument.name for argument in node.target._schema.arguments]
    operand = (dict(zip(names, node.args, strict=False)) | dict(node.kwargs))[name]
    return operand if isinstance(operand, fx.Node) else None


def _count(module: fx.GraphModule, node: fx.Node, name: str, ids: fx.Node, experts: int) -> torch.Tensor:
    """Count before ``node``; returns what is counted in."""
    example = ids.meta["example_value"]
    with torch.inference_mode(False):  # as graphs that run outside of it count, too
        counts_E = torch.zeros(experts, dtype=torch.int64, device=example.device)
    module.register_buffer(name, counts_E, persistent=False)
    with module.graph.inserting_before(node):
        counts = module.graph.get_attr(name)
        call = module.graph.call_function(torch.ops.samoyeds.count_slots.default, (counts, ids))
    for new in (counts, call):
        copy_origin(node, new)
    counts.meta["example_value"] = example.new_empty(experts, dtype=torch.int64)
    return counts_E
