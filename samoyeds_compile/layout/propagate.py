"""The pass: every canonical op of a graph that a CPU kernel or a GPU computes gets a plan of its layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from samoyeds_codegen.gpu.cost import Block
from samoyeds_codegen.gpu.device import device_of
from samoyeds_compile.graph.edit import BLOCK
from samoyeds_compile.graph.values import hint
from samoyeds_compile.layout.gpu import GpuBlock, gpu_plan
from samoyeds_compile.layout.machine import KINDS, here, kind
from samoyeds_compile.layout.plan import PLAN, LayoutPlan, plan, sizes_of
from samoyeds_compile.layout.region import Sizes
from samoyeds_compile.lower.gpu import switched_off, usable
from samoyeds_compile.lower.kernels import cpu_spec
from samoyeds_compile.ops.experts_gpu import gpu_spec, weight_form
from samoyeds_compile.ops.operands import in_width, num_experts
from samoyeds_compile.report.layouts import LayoutReport


def propagate_layouts(
    module: fx.GraphModule, choice: str = "cheapest", triton: bool | None = None, measure: bool = False
) -> list[LayoutReport]:
    """Plan every canonical op of one GraphModule; the lowering reads the plans.

    Where no kernel computes a block there is nothing to choose: PyTorch's products read rows token by token, in slots,
    and so do the stages around them; for grouped products on a GPU the report says what that costs. No guard is added:
    sizes that are symbols stay symbols.

    Args:
        module: whose nodes get plans.
        choice: one of `samoyeds_compile.options.LAYOUTS`.
        triton: the option of this name.
        measure: whether candidates for CUDA devices are measured.
    """
    canonical = torch.ops.samoyeds.moe_experts.default
    found = module.graph.find_nodes(op="call_function", target=canonical)
    plans = [made for node in found if (made := _plan(node, choice, triton, measure)) is not None]
    return [made.report for made in plans]


def _plan(node: fx.Node, choice: str, triton: bool | None, measure: bool) -> LayoutPlan | None:
    if torch.is_grad_enabled():
        return None
    made = _of_gpu(node, choice, triton, measure) if on_gpu(_examples(node.args[4])[0]) else _of_cpu(node, choice)
    if made is not None:
        node.meta[PLAN] = made
    return made


def on_gpu(weight: torch.Tensor) -> bool:
    """Whether a block with this weight is planned for a GPU."""
    return weight.device.type == "cuda"


def _recorded(tokens: Any) -> int | None:
    """How many tokens there were when the graph was captured; None if only running it tells."""
    number = hint(tokens)
    return number if isinstance(number, int) else None


def _of_cpu(node: fx.Node, choice: str) -> LayoutPlan | None:
    (x, ids), gate, up, down = map(_examples, (node.args[:2], *node.args[3:6]))
    if up[0].device.type != "cpu":
        return None
    spec = cpu_spec(gate, up, down, *node.args[9:14])
    if isinstance(spec, str) or kind(spec) not in KINDS:
        return None
    hidden, width = int(x.shape[1]), int(in_width(down, node.args[11] == "in_out"))
    sizes = sizes_of(spec, _known(ids), hidden, width, num_experts(up), int(ids.shape[1]), _has_bias(node))
    return plan(node.name, spec, sizes, here(), choice, node.meta.get(BLOCK), _recorded(ids.shape[0]))


def _of_gpu(node: fx.Node, choice: str, triton: bool | None, measure: bool) -> LayoutPlan | None:
    (x, ids), gate, up, down = map(_examples, (node.args[:2], *node.args[3:6]))
    options: Any = node.args[9:14]
    spec = gpu_spec(gate, up, down, *options)
    if isinstance(spec, str):
        return None
    form = weight_form(gate, up, down, options[1], options[2], bias=_has_bias(node))
    experts, hidden, width = num_experts(up), int(x.shape[1]), int(in_width(down, options[2] == "in_out"))
    kinds: list[str] = []
    if switched_off(spec.pattern is not None, triton) is None:
        kinds = usable(spec, form, Block(experts, hidden, width), ids, up[0].device, measure)[0]
    if not kinds and spec.pattern is not None:  # weights are unpacked in every call
        return None
    sizes = Sizes(_known(ids), hidden, width, experts, int(ids.shape[1]), spec.gated, _has_bias(node),
                  up[0].element_size())  # fmt: skip
    block = GpuBlock(spec, sizes, device_of(up[0].device), " ".join(kinds))
    return gpu_plan(node.name, block, choice, node.meta.get(BLOCK))


def _has_bias(node: fx.Node) -> bool:
    return any(operand is not None for operand in node.args[6:9])


def _known(expert_ids_TK: torch.Tensor) -> int:
    """The number of tokens; any where it is a symbol."""
    return tokens if isinstance(tokens := expert_ids_TK.shape[0], int) else 1


def _examples(nodes: Any) -> list[Any]:
    return [node.meta["example_value"] for node in nodes]
