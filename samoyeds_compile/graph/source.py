"""Where in the user's model a node comes from: module path, source line, parameter name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import fx

from samoyeds_compile.graph.values import Value

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)(?:\n(?!\s*File ")\s*(?P<code>.*))?'
)
_OURS = f"{Path(__file__).parents[1]}/"


def source_line(node: fx.Node) -> str:
    """``file:line: code`` of the innermost line of the user's model, or an empty string."""
    last = last_frame(node.stack_trace or "")
    return "" if last is None else f"{last['file']}:{last['line']}: {(last['code'] or '').strip()}"


def last_frame(stack_trace: str) -> re.Match[str] | None:
    """The innermost frame of a node's stack trace outside this package; its parts are file, line, function, code."""
    frames = list(_FRAME.finditer(stack_trace))
    return next((frame for frame in reversed(frames) if not frame["file"].startswith(_OURS)), None)


def module_path(nodes: Iterable[fx.Node]) -> str:
    """Dotted path of the innermost module that all of ``nodes`` that have one belong to; empty for plain functions."""
    stacks = [[path for path, _ in node.meta["nn_module_stack"].values()] for node in nodes
              if node.meta.get("nn_module_stack")]  # fmt: skip
    common = []
    for paths in zip(*stacks, strict=False):
        if len(set(paths)) > 1:
            break
        common.append(paths[0])
    return dotted_path(common[-1]) if common else ""


def dotted_path(source: str) -> str:
    """``L['self'].model.layers[0].mlp`` or ``L['self']._modules['model']`` -> ``model.layers.0.mlp``."""
    path = re.sub(r"^L\['[^']*'\]", "", source)
    path = re.sub(r"\.?_modules\['([^']+)'\]", r".\1", path)
    path = re.sub(r"\.?_parameters\['([^']+)'\]|\.?_buffers\['([^']+)'\]", lambda m: f".{m[1] or m[2]}", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return re.sub(r"\.+", ".", path).strip(".")


def parameter_name(value: Value) -> str:
    """Name of the parameter that a value is, as the model calls it; empty for a computed tensor."""
    return source_name(value.node)


def source_name(node: fx.Node) -> str:
    """Name of the parameter or input that a placeholder is, as the model calls it; empty for other nodes."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return dotted_path(name() if callable(name) else str(name)) if source is not None else ""
