"""The collectives of a graph, in the order in which they are issued, which all ranks must share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d", "symm_mem", "_dtensor")
WAITING = ("wait_tensor", "barrier_wait")
"""Ops of these namespaces that concern one rank alone."""


def collectives_of(modules: Sequence[fx.GraphModule]) -> tuple[str, ...]:
    """Names of the collectives in graph order, waits left out.

    Args:
        modules: a graph and its nested graphs.
    """
    names = (_name(node) for module in modules for node in module.graph.nodes if node.op == "call_function")
    return tuple(name for name in names if name)


def _name(node: fx.Node) -> str:
    """The op's name without its namespace; empty for what is no collective."""
    target = node.target
    schema = getattr(getattr(target, "default", target), "_schema", None)
    namespace, _, name = (schema.name if schema is not None else "").partition("::")
    return name if namespace in NAMESPACES and name not in WAITING else ""
