"""``samoyeds::moe_experts`` -> ``route``, ``expert_up``, ``expert_down``: the edges between stages become visible.

Or ``experts_packed`` or ``experts_dense`` where one kernel computes the block (see `kernels`), or ``experts_gathered``
(see `choose`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.edit import BLOCK, copy_origin, fill_examples, nodes_between
from samoyeds_compile.layout.plan import PLAN
from samoyeds_compile.lower.choose import prefers_gathered
from samoyeds_compile.lower.kernels import KernelChoice, choose_kernel
from samoyeds_compile.ops.operands import is_stack, num_experts
from samoyeds_compile.rewrite import FAMILY, emit_plan


def lower_experts(module: fx.GraphModule, triton: bool | None = None, measure: bool = False) -> list[KernelChoice]:
    """Lower every canonical op of one GraphModule in place; returns how each is computed.

    Args:
        module: what to change.
        triton: the option of this name.
        measure: whether candidates for CUDA devices are measured.
    """
    canonical = torch.ops.samoyeds.moe_experts.default
    found = module.graph.find_nodes(op="call_function", target=canonical)
    return [_lower(module.graph, node, triton, measure) for node in found]


def _lower(graph: fx.Graph, node: fx.Node, triton: bool | None, measure: bool) -> KernelChoice:
    last, choice = node.prev, _choose_kernel(node, triton, measure)
    with graph.inserting_before(node):
        if not choice.packed and _prefers_gathered(node, choice.op is not None):
            choice = KernelChoice(False, None, "gathered weights are faster for so few tokens")
            out = graph.call_function(torch.ops.samoyeds.experts_gathered.default, node.args)
        elif choice.op is not None:
            out = graph.call_function(choice.op, (*node.args, *choice.arguments))
        else:
            out = _emit_stages(graph, node)
    added = nodes_between(last, node)
    for new in added:
        copy_origin(node, new)
    if "example_value" in node.meta:
        out.meta["example_value"] = node.meta["example_value"]
    fill_examples(added)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return dataclasses.replace(choice, block=node.meta.get(BLOCK))


def _emit_stages(graph: fx.Graph, node: fx.Node) -> fx.Node:
    (x, expert_ids, expert_weights, gate, up, down, gate_bias, up_bias, down_bias, activation, gate_up_layout,
     weight_layout, weighting, compute_dtype, out_dtype) = node.args  # fmt: skip
    ops = torch.ops.samoyeds
    assert isinstance(expert_ids, fx.Node)
    plan = emit_plan(graph, expert_ids, num_experts(_examples(up)))
    before, after = (expert_weights, None) if weighting == "input" else (None, expert_weights)
    h = graph.call_function(ops.expert_up.default, (
        x, *plan, gate, up, gate_bias, up_bias, before, activation, gate_up_layout, weight_layout,
        compute_dtype))  # fmt: skip
    return graph.call_function(ops.expert_down.default, (
        h, *plan, down, down_bias, after, weight_layout, compute_dtype, out_dtype))  # fmt: skip


def _choose_kernel(node: fx.Node, triton: bool | None, measure: bool) -> KernelChoice:
    (expert_ids,), *weights = map(_examples, (node.args[1:2], *node.args[3:6]))
    activation, gate_up_layout, weight_layout, weighting, compute_dtype = node.args[9:14]
    bias = any(operand is not None for operand in node.args[6:9])
    options = (activation, gate_up_layout, weight_layout, weighting, compute_dtype)
    return choose_kernel(
        expert_ids, *weights, *options, bias=bias, triton=triton, measure=measure, layouts=node.meta.get(PLAN)
    )


def _prefers_gathered(node: fx.Node, kernel: bool) -> bool:
    x, expert_ids, *_ = _examples(node.args[:2])
    operands = [weights for weights in map(_examples, node.args[3:6]) if weights]
    if not all(is_stack(weights) for weights in operands):
        return False
    experts = num_experts(operands[0])
    expert_bytes = sum(w.numel() * w.element_size() for (w,) in operands) // experts
    return prefers_gathered(node.meta.get(FAMILY, ""), x, expert_ids, expert_bytes, experts, kernel)


def _examples(nodes: Any) -> list[torch.Tensor]:
    """The example values of a list of nodes."""
    return [node.meta["example_value"] for node in nodes]
