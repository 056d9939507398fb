"""Editing FX graphs in place: inserting calls with their metadata, erasing what a rewrite made superfluous, undoing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from samoyeds_compile.graph.values import Value


def fill_examples(nodes: Iterable[fx.Node]) -> None:
    """Record the fake result of each new call in ``meta["example_value"]``, as Dynamo does for its own nodes."""
    for node in nodes:
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("example_value"))
        fakes = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, FakeTensor)]
        if not fakes or "example_value" in node.meta:
            continue
        with fakes[0].fake_mode, torch.no_grad():
            node.meta["example_value"] = run_node(node, *arguments)


def run_node(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what a node calls."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def unbacked_symbols(node: fx.Node) -> set[Any]:
    """The symbols in a node's recorded result that are known only when the graph runs."""
    symbolic = (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("example_value"))
    return {s for leaf in leaves if isinstance(leaf, symbolic) for s in free_unbacked_symbols(leaf)}


def refresh_examples(source: fx.Node) -> None:
    """Record anew what follows from ``source`` and had sizes that are known now that it is rewritten."""
    queue = [source]
    while queue:
        for user in sorted(queue.pop().users):
            if user.op != "output" and unbacked_symbols(user):
                del user.meta["example_value"]
                fill_examples([user])
                queue.append(user)


def nodes_between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes after ``first`` and before ``last``."""
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


BLOCK = "samoyeds_block"
"""Key in ``node.meta``: the index of the block in the graph's report that a node belongs to, before and after."""


def copy_origin(source: fx.Node, target: fx.Node) -> None:
    """Let a new node say which line, module and block of the user's model it stands for."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", BLOCK):
        if key in source.meta:
            target.meta[key] = source.meta[key]


def erase_members(members: Iterable[Value], output: Value) -> None:
    """Erase the members of a rewritten region that nothing outside it reads."""
    kept = escaping(members, output)
    erased = set(members) - kept
    for value in sorted(erased, key=lambda v: v.position, reverse=True):
        value.node.graph.erase_node(value.node)
    _erase_sizes({o for v in erased for o in v.operands if not o.is_tensor})


def _erase_sizes(sizes: Iterable[Value]) -> None:
    """Erase the size computations (``2 * s0``) that only erased nodes read."""
    for size in sorted((s for s in sizes if not s.is_tensor), key=lambda v: v.position, reverse=True):
        node = size.node
        if node.op in ("call_function", "call_method") and not node.users and not node._erased:
            node.graph.erase_node(node)
            _erase_sizes(set(size.operands))


def escaping(members: Iterable[Value], output: Value) -> set[Value]:
    """The members that must stay because something outside the region reads them, and what those are computed from.

    Writes are values like others here: a write stays if and only if a reader of what it wrote stays.
    """
    inside = set(members)
    kept: set[Value] = set()
    stack = [v for v in inside if v is not output and any(u not in inside for u in v.users)]
    while stack:
        value = stack.pop()
        if value not in kept and value in inside:
            kept.add(value)
            stack.extend(value.operands)
    return kept


class Snapshot:
    """A copy of a module's graphs, so that a failed pipeline leaves the user's graph as it came."""

    def __init__(self, modules: Iterable[fx.GraphModule]) -> None:
        self._saved = [(m, _copy(m.graph)) for m in modules]

    def restore(self) -> None:
        """Put the copies back."""
        for module, graph in self._saved:
            module.graph = graph
            module.recompile()


def _copy(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph(tracer_cls=graph._tracer_cls)
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        new = copied[node] = copy.node_copy(node, copied.__getitem__)
        new.name = node.name
        if hasattr(node, "_dynamo_source"):  # AOTAutograd tells parameters apart by it
            new._dynamo_source = node._dynamo_source
    return copy
