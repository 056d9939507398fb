"""``report.html``: one file that a browser opens without a network, made of what lies in a dump folder."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samoyeds_compile.report import files

LARGEST_PAGE = 32 * 2**20
"""Characters of data in a page; graphs beyond them are only listed."""
_PAGE = Path(__file__).parent / "page"
_SHOWN = (".svg", ".txt", ".json")
"""What is shown of the files that lie beside a block's program."""


def write_page(root: Path, report: dict[str, Any]) -> None:
    """Write ``report.html`` into a dump folder.

    Args:
        root: the folder.
        report: what ``report.json`` has.
    """
    views, size = [], 0
    for graph in report["graphs"]:
        text = _graph(root / Path(graph["dump"]).name)
        size += len(text)
        views.append(text if size <= LARGEST_PAGE else "null")
    data = f'{{"report": {json.dumps(report)}, "folder": {json.dumps(root.name)}, "views": [{", ".join(views)}]}}'
    parts = {name: (_PAGE / name).read_text() for name in ("style.css", "layout.js", "code.js", "page.js")}
    files.write(root / "report.html", _template().render(parts=parts, data=data.replace("<", "\\u003c")))


@functools.cache
def _template() -> Any:
    from jinja2 import Environment  # here, as importing the package must stay light

    return Environment().from_string((_PAGE / "page.html").read_text())


def _graph(folder: Path) -> str:
    """What is shown of one graph, as JSON."""
    view = folder / "view.json"
    texts = {path.name: path.read_text() for path in sorted(folder.glob("kernels/*"))}
    artefacts = [*_artefacts(folder)]
    shown = view.read_text() if view.exists() else "null"
    return f'{{"view": {shown}, "kernels": {json.dumps(texts)}, "artefacts": {json.dumps(artefacts)}}}'


def _artefacts(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.svg")):
        yield {"block": None, "name": path.name, "text": path.read_text()}
    for path in sorted(folder.glob("blocks/*/*")):
        if path.suffix in _SHOWN and path.parent.name.isdigit():
            yield {"block": int(path.parent.name), "name": path.name, "text": path.read_text()}
