"""Tables for people and one file for programs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS
from benchmarks.gpu.rows import Row

WIDTH = 150


def show(console: Console, rows: Sequence[Row], notes: Sequence[Mapping[str, Any]]) -> None:
    """A table for each shape and number of tokens, fastest first, and what did not take part."""
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in rows):
        console.print(
            table(f"{shape}, {tokens} tokens", [r for r in rows if (r["shape"], r["tokens"]) == (shape, tokens)])
        )
    said: dict[tuple[str, ...], dict[str, None]] = {}
    for note in notes:
        what = (note["event"], note.get("name", ""), note.get("reason", ""))
        said.setdefault(what, {})[f"{note['shape']} {note.get('tokens') or ''}".strip()] = None
    for (event, name, reason), where in said.items():
        console.print(f"{event}: {name} {reason} ({', '.join(where)})", markup=False)


def table(title: str, rows: Sequence[Row]) -> Table:
    """One point; a ratio above 1 is faster than the best dense peer that computes the whole block."""
    found = Table(title=title, width=WIDTH)
    for column in COLUMNS:
        found.add_column(column, justify="left" if column in ("name", "work") else "right")
    for row in sorted(rows, key=lambda r: r["ms"]):
        found.add_row(*(text(row) for text in COLUMNS.values()), style="bold" if row["ours"] else "")
    return found


COLUMNS = {
    "name": lambda r: r["name"],
    "work": lambda r: r["work"],
    "ms": lambda r: f"{r['ms']:.4f}",
    "ratio": lambda r: "" if r["ratio"] is None else f"{r['ratio']:.2f}",
    "TB/s": lambda r: f"{r['tb_per_s']:.2f}",
    "TFLOP/s": lambda r: f"{r['tflop_per_s']:.0f}",
    "of roofline": lambda r: f"{r['roofline_share']:.0%}",
    "error": lambda r: "" if r["error"] is None else f"{r['error']:.1e}",
    "peak MiB": lambda r: f"{r['peak_bytes'] / 2**20:.0f}",
    "largest batch": lambda r: f"{r['largest_batch']:,}",
}


def save(results: Mapping[str, Any], folder: Path) -> Path:
    """One file a run, named by its machine's device and by time."""
    device = re.sub(r"[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
    path = folder / f"gpu-{device}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


FOLDER = RESULTS
