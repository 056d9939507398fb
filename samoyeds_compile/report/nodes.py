"""Nodes of a graph as short text for people: the call, its shape, its line."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.source import dotted_path, last_frame, source_name
from samoyeds_compile.graph.values import hint

LONGEST_CALL = 160
"""Characters of one call, at most."""
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "bool", "complex": "c"}


def label(node: fx.Node) -> str:
    """What the node calls: ``samoyeds.route``, ``topk``, ``.view``."""
    if node.op == "call_method":
        return f".{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return str(getattr(node.target, "__name__", node.target))


def call_text(node: fx.Node) -> str:
    """The call as code, cut to `LONGEST_CALL` characters."""
    named = [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    text = f"{label(node)}({', '.join([*map(_argument, node.args), *named])})"
    return text if len(text) <= LONGEST_CALL else text[: LONGEST_CALL - 1] + "…"


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    return short_name(value) if isinstance(value, fx.Node) else re.sub(r"^torch\.", "", str(value))


def short_name(node: fx.Node) -> str:
    """A node's name; of a parameter, whose name is as long as its path, the last two parts of that."""
    path = source_name(node) if is_parameter(node) else ""
    return ".".join(path.split(".")[-2:]) or node.name


def shape_text(value: Any) -> str:
    """``bf16[6, 16]``; of a tuple all its members; empty for what is no tensor."""
    if isinstance(value, (tuple, list)):
        return ", ".join(filter(None, map(shape_text, value)))
    if not isinstance(value, torch.Tensor):
        return ""
    kind, bits = re.fullmatch(r"([a-z]+)(\w*)", str(value.dtype).removeprefix("torch.")).groups()  # type: ignore[union-attr]
    return f"{_DTYPES.get(kind, kind)}{bits}[{', '.join(str(hint(size)) for size in value.shape)}]"


def is_parameter(node: fx.Node) -> bool:
    """Whether a node is a parameter or buffer of the model, lifted to an input of the graph."""
    if node.op != "placeholder":
        return False
    lifted = "_parameters_" in node.name or "_buffers_" in node.name
    return lifted or isinstance(node.meta.get("example_value"), torch.nn.Parameter)


def line_of(node: fx.Node) -> tuple[str, int] | None:
    """File and line of the model that the node comes from."""
    return _line(node.stack_trace or "")


@functools.lru_cache(4096)
def _line(trace: str) -> tuple[str, int] | None:
    frame = last_frame(trace)
    return None if frame is None else (frame["file"], int(frame["line"]))


def path_of(node: fx.Node) -> str:
    """Dotted path of the module that the node belongs to."""
    stack = node.meta.get("nn_module_stack")
    return _path(next(reversed(stack.values()))[0]) if stack else ""


_path = functools.lru_cache(4096)(dotted_path)
