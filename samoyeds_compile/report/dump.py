"""The dump folder: each graph as runnable Python, before and after each step, and the reports.

    DIR/report.html                 all graphs in the folder, to look at in a browser
    DIR/report.json                 the same as data
    DIR/graph_000/before.py         what Dynamo captured
    DIR/graph_000/after_rewrite.py  with canonical ops; run it: it compares itself with before.py
    DIR/graph_000/after_lower.py    with stage ops, or one op for each block that has a kernel
    DIR/graph_000/kernels/          the generated text of kernels, and how it was compiled
    DIR/graph_000/blocks/0/         one block alone: block.py, and whatever else there is to see of it
    DIR/graph_000/blocks/0/measured.json  how long it takes, once `repro --time` measured it
    DIR/graph_000/graph.json        the report of this graph
    DIR/graph_000/view.json         what report.html shows of it

Several processes may dump into one folder: each graph takes a fresh number, and every file is written in one go.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from samoyeds_compile.report import files
from samoyeds_compile.report.html import write_page
from samoyeds_compile.report.layout_picture import picture
from samoyeds_compile.report.model import SCHEMA_VERSION, GraphReport
from samoyeds_compile.report.program import graph_program, inputs_of
from samoyeds_compile.report.view import View

if TYPE_CHECKING:
    from samoyeds_compile.lower.kernels import KernelChoice
    from samoyeds_compile.match.region import MoERegion
    from samoyeds_compile.report.model import BlockReport, Report

logger = logging.getLogger(__name__)


class GraphDump:
    """The folder of one graph.

    Attributes:
        left_out: what was not written, and why.
    """

    def __init__(self, root: Path, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.root = root
        self.folder = files.fresh_folder(root)
        self.left_out: list[str] = []
        self.full = files.size_of(root) > files.LARGEST_FOLDER
        if self.full:
            self.left_out.append(f"all programs and kernels: the folder holds over {files.LARGEST_FOLDER >> 20} MiB")
        self.inputs = "" if self.full else inputs_of(gm, example_inputs)
        self.view = View(gm, example_inputs)
        self.graph("before", gm)

    def graph(self, name: str, gm: fx.GraphModule) -> None:
        """Write the graph as it is now to ``<name>.py``; a graph that cannot be written down costs only its file."""
        self._text(f"{name}.py", lambda: graph_program(name, gm, self.inputs))

    def found(self, gm: fx.GraphModule, matches: Sequence[tuple[MoERegion, BlockReport]]) -> None:
        """Look at the blocks, and write each that will be rewritten as a program of its own, one of each kind."""
        from samoyeds_compile.report.alone import block_program

        self.view.found(gm)
        kinds: dict[Any, int] = {}
        for i, (region, block) in enumerate(matches):
            first = kinds.setdefault(_kind(region, block), i)
            self.view.programs[i] = first
            if first == i:
                program = partial(block_program, region, i, self.folder.name, block.module)
                self._text(f"blocks/{i}/block.py", program)

    def kernels(self, choices: Sequence[KernelChoice]) -> None:
        """Write the generated kernels, each once, and note which block has which."""
        texts: dict[str, list[str]] = {}
        for choice in choices:
            if str(choice) not in texts:
                generated = choice.texts()
                texts[str(choice)] = list(generated)
                for name, text in generated.items():
                    self._text(f"kernels/{name}", partial(str, text))
            if choice.block is not None:
                self.view.kernels[choice.block] = {"title": str(choice), "files": texts[str(choice)]}

    def artefact(self, block: int, name: str, text: str) -> None:
        """Keep something to see of one block (an SVG, a table as text, JSON); the report shows every such file."""
        self._text(f"blocks/{block}/{name}", lambda: text)

    def finish(self, report: GraphReport, gm: fx.GraphModule) -> None:
        """Write the graph's report and bring those of the whole folder up to date."""
        report.dump, report.left_out = str(self.folder), self.left_out
        for layout in report.layouts:
            name = f"layouts_{layout.block}.svg" if layout.index is None else f"blocks/{layout.index}/layouts.svg"
            self._text(name, partial(picture, layout))
        self._text("view.json", lambda: json.dumps(self.view.finished(gm, report)))
        files.write(self.folder / "graph.json", json.dumps(dataclasses.asdict(report), indent=2))
        write_reports(self.root)

    def _text(self, name: str, make: Callable[[], str]) -> None:
        """Write one file, unless there is no room for it or it cannot be made."""
        if self.full:
            return
        try:
            text = make()
        except Exception as error:
            logger.warning("samoyeds could not write %s of %s", name, self.folder, exc_info=True)
            self.left_out.append(f"{name}: {type(error).__name__}: {error}")
            return
        if len(text) > files.LARGEST_FILE:
            self.left_out.append(f"{name}: {len(text) / 2**20:.0f} MiB, over {files.LARGEST_FILE >> 20}")
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, text)


def write_reports(root: Path, **of_model: Any) -> None:
    """Gather the graphs of a folder into its ``report.json`` and ``report.html``.

    Args:
        root: the folder.
        of_model: what is known of the model as a whole: ``uncaptured``, ``breaks``, ``notes``.
    """
    graphs = [json.loads(path.read_text()) for path in sorted(root.glob("graph_*/graph.json"))]
    report = {"version": SCHEMA_VERSION, "graphs": graphs, **of_model}
    files.write(root / "report.json", json.dumps(report, indent=2))
    write_page(root, report)


def refresh_reports(root: Path) -> None:
    """Gather the graphs of a folder anew, and keep what its ``report.json`` says of the model as a whole."""
    old = json.loads((root / "report.json").read_text()) if (root / "report.json").exists() else {}
    write_reports(root, **{name: old[name] for name in ("uncaptured", "breaks", "notes") if name in old})


def update_reports(report: Report) -> None:
    """Write what is known of dumped graphs by now: the `GraphReport` of each, and the reports of their folders."""
    folders = {Path(graph.dump): graph for graph in report.graphs if graph.dump}
    for folder, graph in folders.items():
        files.write(folder / "graph.json", json.dumps(dataclasses.asdict(graph), indent=2))
    for root in dict.fromkeys(folder.parent for folder in folders):
        refresh_reports(root)


def _kind(region: MoERegion, block: BlockReport) -> Any:
    """What two blocks of a model have in common if their programs would be the same but for names."""
    sizes = (block.family, block.experts, block.top_k, block.hidden_size, block.intermediate_size)
    return (*sizes, block.activation, len(region.members), region.output.dtype, str(region.output.shape))
