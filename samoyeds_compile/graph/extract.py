"""Cut a region out of a graph as a module of its own, at sizes of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.ops import SIGNATURES
from samoyeds_compile.graph.values import Value, hint


def extract(
    members: Sequence[Value],
    inputs: Sequence[Value],
    output: Value,
    sizes: Sequence[tuple[Value, tuple[str | int, ...], int]],
) -> fx.GraphModule:
    """A module that computes ``output`` from ``inputs``, one placeholder for each, in order.

    Args:
        members: the values to copy, in graph order.
        inputs: values that become placeholders.
        output: the member to return.
        sizes: (member, path of an argument by canonical name, number to put there).
    """
    graph = fx.Graph()
    placeholders = {value: graph.placeholder(f"input_{i}") for i, value in enumerate(inputs)}
    copies: dict[fx.Node, fx.Node] = {}
    for value in members:
        if value.op == "aliased_write":
            continue
        source = value.node
        args, kwargs = _with_sizes(value, [(path, n) for member, path, n in sizes if member is value])
        substitute = _substitution(value, placeholders, copies)
        new_args, new_kwargs = fx.map_arg((args, kwargs), substitute)
        copies[source] = graph.create_node(source.op, source.target, tuple(new_args), dict(new_kwargs))
    graph.output(copies[output.node])
    return fx.GraphModule(torch.nn.Module(), graph)


def _substitution(
    value: Value, placeholders: Mapping[Value, fx.Node], copies: Mapping[fx.Node, fx.Node]
) -> Callable[[fx.Node], Any]:
    def substitute(node: fx.Node) -> Any:
        meaning = value.reads[node]
        if meaning in placeholders:
            return placeholders[meaning]
        if node in copies:
            return copies[node]
        return hint(meaning.example)  # a size of the graph that no literal stands for

    return substitute


def _with_sizes(value: Value, sizes: Sequence[tuple[tuple[str | int, ...], int]]) -> tuple[Any, Any]:
    args, kwargs = value.node.args, dict(value.node.kwargs)
    for path, size in sizes:
        where = _raw_path(value.node, path)
        if where[0] in kwargs:
            kwargs = _replaced(kwargs, where, size)
        else:
            args = _replaced(args, where, size)
    return args, kwargs


def _raw_path(node: fx.Node, path: tuple[str | int, ...]) -> tuple[Any, ...]:
    """Where the argument that `graph.ops` calls ``path`` stands in ``node.args`` or ``node.kwargs``."""
    name, *rest = path
    if name in node.kwargs:
        return path
    if name == "shape":
        return (1, *rest) if isinstance(node.args[1], (tuple, list)) else (1 + int(rest[0]),)
    if name == "key":
        return (1, *rest) if isinstance(node.args[1], tuple) else (1, *rest[1:])
    if name == "end":
        return (0,) if len(node.args) == 1 else (1,)
    parameters = SIGNATURES["split"] if name == "split_size" else ()
    return (parameters.index(str(name)), *rest)


def _replaced(container: Any, where: tuple[Any, ...], new: int) -> Any:
    if not where:
        return new
    first, rest = where[0], where[1:]
    if isinstance(container, slice):
        edges = {e: getattr(container, e) for e in ("start", "stop", "step")} | {first: new}
        return slice(edges["start"], edges["stop"], edges["step"])
    if isinstance(container, dict):
        return container | {first: _replaced(container[first], rest, new)}
    return type(container)(_replaced(c, rest, new) if i == first else c for i, c in enumerate(container))
