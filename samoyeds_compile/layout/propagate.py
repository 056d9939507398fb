"""The pass: every canonical op of a graph that a CPU kernel computes gets a plan of its layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.edit import BLOCK
from samoyeds_compile.graph.values import hint
from samoyeds_compile.layout.machine import KINDS, here, kind
from samoyeds_compile.layout.plan import PLAN, LayoutPlan, plan, sizes_of
from samoyeds_compile.lower.kernels import cpu_spec
from samoyeds_compile.ops.operands import in_width, num_experts
from samoyeds_compile.report.layouts import LayoutReport


def propagate_layouts(module: fx.GraphModule, choice: str = "cheapest") -> list[LayoutReport]:
    """Plan every canonical op of one GraphModule; the lowering reads the plans.

    Where no kernel computes a block there is nothing to choose: PyTorch's products read rows token by token, in slots,
    and so do the stages around them. No guard is added: sizes that are symbols stay symbols.

    Args:
        module: whose nodes get plans.
        choice: one of `samoyeds_compile.options.LAYOUTS`.
    """
    canonical = torch.ops.samoyeds.moe_experts.default
    found = module.graph.find_nodes(op="call_function", target=canonical)
    plans = [made for node in found if (made := _plan(node, choice)) is not None]
    return [made.report for made in plans]


def _plan(node: fx.Node, choice: str) -> LayoutPlan | None:
    (x, ids), gate, up, down = ([_example(n) for n in _list(arg)] for arg in (node.args[:2], *node.args[3:6]))
    if up[0].device.type != "cpu" or torch.is_grad_enabled():
        return None
    options = node.args[9:14]
    spec = cpu_spec(gate, up, down, *options)
    if isinstance(spec, str) or kind(spec) not in KINDS:
        return None
    tokens, top_k = ids.shape
    known = tokens if isinstance(tokens, int) else 1
    bias = any(operand is not None for operand in node.args[6:9])
    hidden, width = int(x.shape[1]), in_width(down, options[2] == "in_out")
    sizes = sizes_of(spec, known, hidden, int(width), num_experts(up), int(top_k), bias)
    made = plan(node.name, spec, sizes, here(), choice, node.meta.get(BLOCK), _recorded(tokens))
    node.meta[PLAN] = made
    return made


def _recorded(tokens: Any) -> int | None:
    """How many tokens there were when the graph was captured; None if only running it tells."""
    number = hint(tokens)
    return number if isinstance(number, int) else None


def _list(argument: Any) -> list[fx.Node]:
    return list(argument)


def _example(node: fx.Node) -> Any:
    return node.meta["example_value"]
