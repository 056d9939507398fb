"""Graphs as Python programs that run by themselves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from samoyeds_compile.graph.values import graph_modules, hint
from samoyeds_compile.lower.routing import counters
from samoyeds_compile.sparsity.tensor import PackedTensor

_TEMPLATES = Path(__file__).parent / "templates"


def graph_program(name: str, gm: fx.GraphModule, inputs: str) -> str:
    """A captured graph; unless it is ``before`` it compares itself with ``before.py`` beside it.

    Args:
        name: of the file, without its suffix.
        gm: the graph as it is now.
        inputs: what `inputs_of` gave when it was captured.
    """
    code = readable(gm)
    is_first = name == "before"
    return fill(
        "graph",
        title=f"The graph {'as Dynamo captured it' if is_first else name.replace('_', ' ')}.",
        check_note="" if is_first else ", and to compare the results with before.py",
        imports="\n".join(sorted(set(imports(gm, code)))),
        code=code,
        inputs=inputs,
        class_name=code.split("class ", 1)[1].split("(", 1)[0].strip(),
        grad_mode="enable_grad" if torch.is_grad_enabled() else "no_grad",
        compares=not is_first,
        counts=counters(gm),
    )


def fill(template: str, **values: Any) -> str:
    """One of the templates of this package with its blanks filled."""
    shared = {name: (_TEMPLATES / f"{name}.txt").read_text() for name in ("makers", "compare")}
    return str(_template(template).render(**shared, **values))


@functools.cache
def _template(name: str) -> Any:
    from jinja2 import Environment  # here, as importing the package must stay light

    return Environment(keep_trailing_newline=True).from_string((_TEMPLATES / f"{name}.txt").read_text())


def readable(gm: fx.GraphModule) -> str:
    """The graph's code with the lines of the model that it comes from."""
    return gm.print_readable(print_output=False, include_stride=False, include_device=False).strip()


def imports(gm: fx.GraphModule, code: str) -> Iterator[str]:
    """Import lines for the names that the graph's code uses beside torch's."""
    if "torch.ops.transformers" in code:
        yield "import transformers.integrations.moe"
    names: dict[str, Any] = {}
    for module in graph_modules(gm):
        names |= module.graph.python_code("self").globals
    for name, thing in names.items():
        if name not in ("torch", "device", "inf", "nan", "NoneType") and callable(thing) and hasattr(thing, "__name__"):
            yield f"from {thing.__module__} import {thing.__name__} as {name}"


def inputs_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """Calls that make the inputs of a captured graph, one a line."""
    nodes = gm.graph.find_nodes(op="placeholder")
    pairs = zip(nodes, example_inputs, strict=True)
    return "\n".join(f"        {input_of(n.meta.get('example_value'), given)},  # {n.name}" for n, given in pairs)


def input_of(example: Any, given: Any, below: int = 2) -> str:
    """The call that makes one input.

    Args:
        example: what Dynamo recorded.
        given: the real input, or the same as ``example``.
        below: integers are made up below this number.
    """
    if isinstance(given, torch.Tensor) and given.dim() == 0 and type(given) is torch.Tensor:
        return f"torch.tensor({given.item()!r}, dtype={given.dtype})"  # a number of the model, such as an epsilon
    if isinstance(example, PackedTensor):
        shapes = (
            tuple(t.shape) if t is not None else None for t in (example.kept, example.metadata, example.selection)
        )
        form = dataclasses.asdict(example.form)
        return f"packed({', '.join(map(repr, shapes))}, {example.dtype}, {form})"
    if isinstance(example, torch.Tensor):
        shape, stride = ([hint(s) for s in sizes] for sizes in (example.shape, example.stride()))
        requires_grad = example.requires_grad and example.is_leaf
        return f"tensor({shape}, {stride}, {example.dtype}, {requires_grad}{f', {below}' if below != 2 else ''})"
    return repr(hint(given))
