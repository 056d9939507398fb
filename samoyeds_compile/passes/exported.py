"""`rewrite_exported`: the pipeline on a ``torch.export`` program, whose graph is ATen and functional already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from samoyeds_compile.backend import optimize
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
    for node in _nodes(program.graph_module):
        if "example_value" in node.meta:
            node.meta.setdefault("val", node.meta.pop("example_value"))
    if chosen.report is not None:
        chosen.report(report)
    return program


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
