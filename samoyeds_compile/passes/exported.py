"""`rewrite_exported`: the pipeline on a ``torch.export`` program, whose graph is ATen and functional already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from samoyeds_compile.backend import optimize
from samoyeds_compile.graph.edit import fill_examples, nodes_between
from samoyeds_compile.graph.values import graph_modules
from samoyeds_compile.options import Options


def rewrite_exported(
    program: torch.export.ExportedProgram, options: Mapping[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """Rewrite the MoE blocks of an exported program in place; what is not recognised stays as it is.

    Export under ``torch.no_grad()``, and call this under it too, to get kernels. Whoever loads the program, or what
    AOTInductor made of it, needs ``import samoyeds_compile`` first: the graph names its operators.

    Args:
        program: fresh from ``torch.export.export``, not decomposed.
        options: as for ``torch.compile(..., backend="samoyeds", options=...)``.

    Returns:
        The program.

    Raises:
        OptionError: an unknown option.
    """
    chosen = Options.from_call(None, dict(options or {}))
    _erase_assertions(program.graph_module)
    for node in _nodes(program.graph_module):
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    report = optimize(program.graph_module, [], chosen)
    for module in graph_modules(program.graph_module):
        _separate_gates(module)
    for node in _nodes(program.graph_module):
        if "example_value" in node.meta:
            node.meta.setdefault("val", node.meta.pop("example_value"))
    _name_outputs(program)
    if chosen.report is not None:
        chosen.report(report)
    return program


def _name_outputs(program: torch.export.ExportedProgram) -> None:
    """Where a block is itself an output of the program, the signature names what computes it now."""
    (outputs,) = program.graph.output_node().args
    for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):
        if isinstance(node, fx.Node):
            spec.arg.name = node.name


def _separate_gates(module: fx.GraphModule) -> None:
    """Give kernels of packed gate and up projections views of each, instead of an empty list for the gate.

    AOTInductor's proxy executor (torch 2.13) calls an operator whose list of tensors is empty with None in its place.
    Experts without a gate have no kernel then: the canonical op is taken apart, and the ops in it get no empty list.
    """
    graph, target = module.graph, torch.ops.samoyeds.experts_dense.default
    for node in graph.find_nodes(op="call_function", target=target):
        gate, up, gate_up_layout, weight_layout = node.args[3], node.args[4], node.args[10], node.args[11]
        if gate_up_layout == "none":
            canonical = torch.ops.samoyeds.moe_experts.default
            node.target, node.args = canonical, node.args[: len(canonical._schema.arguments)]  # it has no layouts
        if gate or gate_up_layout not in ("concatenated", "interleaved"):
            continue
        last, dim = node.prev, -1 if weight_layout == "in_out" else -2
        with graph.inserting_before(node):
            halves = [_halves(graph, weight, dim, gate_up_layout) for weight in up]
            biases = (None, None) if node.args[7] is None else _halves(graph, node.args[7], -1, gate_up_layout)
        fill_examples(nodes_between(last, node))
        gates, ups = (list(side) for side in zip(*halves, strict=True))
        node.args = (*node.args[:3], gates, ups, node.args[5], *biases, *node.args[8:10], "separate", *node.args[11:])
    module.recompile()


def _halves(graph: fx.Graph, weight: Any, dim: int, layout: str) -> tuple[fx.Node, fx.Node]:
    """Views of the gate's outputs and of the others along ``dim``."""
    size = weight.meta["example_value"].shape[dim]
    spans = ((0, size // 2, 1), (size // 2, size, 1)) if layout == "concatenated" else ((0, size, 2), (1, size, 2))
    gate, up = (graph.call_function(torch.ops.aten.slice.Tensor, (weight, dim, *span)) for span in spans)
    return gate, up


def _nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (node for module in graph_modules(gm) for node in module.graph.nodes)


def _erase_assertions(gm: fx.GraphModule) -> None:
    """Take away what export says about dtypes it has seen: it reads rows of experts that a rewrite makes superfluous.

    Example values hold the same, and the guards on the program's inputs stay.
    """
    for module in graph_modules(gm):
        for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
            module.graph.erase_node(node)
        module.recompile()
