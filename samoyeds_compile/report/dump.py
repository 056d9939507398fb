"""The dump folder: each graph as runnable Python, before and after each step, and the reports.

    DIR/report.json                 all graphs in the folder
    DIR/graph_000/before.py         what Dynamo captured
    DIR/graph_000/after_rewrite.py  with canonical ops; run it: it compares itself with before.py
    DIR/graph_000/after_lower.py    with stage ops, or one op for each block that has a kernel
    DIR/graph_000/kernels/          the generated text of kernels
    DIR/graph_000/graph.json        the report of this graph

Several processes may dump into one folder: each graph takes a fresh number, and every file is written in one go.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from samoyeds_compile.errors import OptionError
from samoyeds_compile.graph.values import graph_modules, hint
from samoyeds_compile.report.model import SCHEMA_VERSION, GraphReport

logger = logging.getLogger(__name__)

_TEMPLATE = '''"""{title}

Written by samoyeds. Run it to execute the graph on made-up inputs of the recorded shapes{check_note}.
"""

import inspect
from pathlib import Path

import torch
from math import inf, nan
from torch import device

import samoyeds_compile  # registers the samoyeds:: ops
{imports}

{code}


def instantiate(cls):
    """An instance of a graph's class, with instances of the nested graphs that it calls (checkpoint bodies)."""
    module = cls()
    for name, nested in vars(cls).items():
        if isinstance(nested, type) and issubclass(nested, torch.nn.Module):
            object.__setattr__(module, name, as_graph(instantiate(nested)))
    return module


def as_graph(module):
    """A GraphModule that calls the module: what higher-order ops expect as their body."""
    graph = torch.fx.Graph()
    arguments = [graph.placeholder(name) for name in inspect.signature(module.forward).parameters]
    graph.output(graph.call_module("body", tuple(arguments)))
    return torch.fx.GraphModule({{"body": module}}, graph)


def make_inputs(seed=0):
    """Inputs of the shapes, strides and dtypes that were compiled."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(shape, stride, dtype, requires_grad):
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if all(shape) else 0
        if dtype.is_floating_point:
            data = (torch.randn(size, generator=generator) * 0.1).to(dtype)
        elif dtype is torch.bool:
            data = torch.ones(size, dtype=dtype)
        else:
            data = torch.randint(0, 2, (size,), generator=generator).to(dtype)
        return data.as_strided(shape, stride).requires_grad_(requires_grad)

    return [
{inputs}
    ]


def run():
    """All outputs as a flat list."""
    with torch.{grad_mode}():
        return torch.utils._pytree.tree_leaves(instantiate({class_name})(*make_inputs()))


def main():
    outputs = run()
    for output in outputs:
        print(tuple(output.shape) if isinstance(output, torch.Tensor) else output)
{main_tail}

if __name__ == "__main__":
    main()
'''

_COMPARE = """    import runpy

    before = runpy.run_path(str(Path(__file__).with_name("before.py")))["run"]()
    for mine, theirs in zip(outputs, before, strict=True):
        if isinstance(mine, torch.Tensor):
            tolerance = 1e-4 if mine.dtype in (torch.float32, torch.float64) else 3e-2
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    print("equal to before.py")
"""


class GraphDump:
    """The folder of one graph."""

    def __init__(self, root: Path, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.root = root
        self.folder = _fresh_folder(root)
        self.inputs = _inputs_of(gm, example_inputs)
        self.graph("before", gm)

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """Write the graph as it is now to ``<name>.py``; a graph that cannot be written down costs only its file."""
        try:
            program = _as_program(name, gm, self.inputs)
        except Exception:
            logger.warning("samoyeds could not write %s of graph %s as a program", name, self.folder, exc_info=True)
            program = f"# This graph could not be written as a program; its nodes were:\n{gm.graph}".replace(
                "\n", "\n# "
            )
        _write(self.folder / f"{name}.py", program)

    def kernels(self, texts: Mapping[str, str]) -> None:
        """Write generated kernels, by names of files."""
        folder = self.folder / "kernels"
        if texts:
            folder.mkdir()
        for name, text in texts.items():
            _write(folder / name, text)

    def finish(self, report: GraphReport) -> None:
        """Write the graph's report and bring the folder's ``report.json`` up to date."""
        report.dump = str(self.folder)
        _write(self.folder / "graph.json", json.dumps(dataclasses.asdict(report), indent=2))
        graphs = [json.loads(p.read_text()) for p in sorted(self.root.glob("graph_*/graph.json"))]
        _write(self.root / "report.json", json.dumps({"version": SCHEMA_VERSION, "graphs": graphs}, indent=2))


def _fresh_folder(root: Path) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            folder = root / f"graph_{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        remedy = "give a folder that can be created and written to"
        raise OptionError(f"option 'dump' is {str(root)!r}, which does not work ({error}); {remedy}") from error
    raise AssertionError("unreachable")


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def _as_program(name: str, gm: fx.GraphModule, inputs: str) -> str:
    code = gm.print_readable(print_output=False, include_stride=False, include_device=False).strip()
    class_name = code.split("class ", 1)[1].split("(", 1)[0].strip()
    is_first = name == "before"
    return _TEMPLATE.format(
        title=f"The graph {'as Dynamo captured it' if is_first else name.replace('_', ' ')}.",
        check_note="" if is_first else ", and to compare the results with before.py",
        imports="\n".join(_imports(gm, code)),
        code=code,
        inputs=inputs,
        class_name=class_name,
        grad_mode="enable_grad" if torch.is_grad_enabled() else "no_grad",
        main_tail="" if is_first else _COMPARE,
    )


def _imports(gm: fx.GraphModule, code: str) -> Iterator[str]:
    """Import lines for the names that the graph's code uses beside torch's."""
    if "torch.ops.transformers" in code:
        yield "import transformers.integrations.moe"
    names: dict[str, Any] = {}
    for module in graph_modules(gm):
        names |= module.graph.python_code("self").globals
    for name, thing in names.items():
        if name not in ("torch", "device", "inf", "nan", "NoneType") and callable(thing) and hasattr(thing, "__name__"):
            yield f"from {thing.__module__} import {thing.__name__} as {name}"


def _inputs_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    nodes = gm.graph.find_nodes(op="placeholder")
    pairs = zip(nodes, example_inputs, strict=True)
    return "\n".join(f"        {_input_of(n.meta.get('example_value'), given)},  # {n.name}" for n, given in pairs)


def _input_of(example: Any, given: Any) -> str:
    if isinstance(given, torch.Tensor) and given.dim() == 0 and type(given) is torch.Tensor:
        return f"torch.tensor({given.item()!r}, dtype={given.dtype})"  # a number of the model, such as an epsilon
    if isinstance(example, torch.Tensor):
        shape, stride = ([hint(s) for s in sizes] for sizes in (example.shape, example.stride()))
        return f"tensor({shape}, {stride}, {example.dtype}, {example.requires_grad and example.is_leaf})"
    return repr(hint(given))
