"""What the cost model loses against measuring: the time of what it takes over that of what max-autotune takes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from benchmarks.gpu.ours import MEASURED, MODEL
from benchmarks.gpu.rows import Row


def losses(rows: Sequence[Row]) -> list[Row]:
    """A line for each shape, number of tokens and form of weights at which both were timed, in turns.

    ``loss`` is 0 where both take the same kernels; below 0, measuring was misled.
    """
    points = dict.fromkeys((row["shape"], row["tokens"], row["form"]) for row in rows)
    found = [_loss([row for row in rows if (row["shape"], row["tokens"], row["form"]) == point]) for point in points]
    return [row for row in found if row]


def _loss(rows: Sequence[Row]) -> Row | None:
    by_name = {row["name"].removeprefix(f"{row['form']}, "): row for row in rows}
    if not {MODEL, MEASURED} <= by_name.keys():
        return None
    model, measured = by_name[MODEL], by_name[MEASURED]
    same = model["candidate"] == measured["candidate"]
    return {
        **{name: model[name] for name in ("shape", "tokens", "form", "model_ms")},
        "model": model["candidate"], "measured": measured["candidate"],
        "ms": model["ms"], "measured_ms": measured["ms"],
        "loss": 0.0 if same else round(model["ms"] / measured["ms"] - 1, 3),
    }  # fmt: skip


def table(found: Sequence[Row], width: int) -> Table:
    """All lines; the title says the worst and the median."""
    every = [row["loss"] for row in found]
    title = f"the cost model loses {max(every):.0%} at most, {statistics.median(every):.0%} in the middle"
    shown = Table(title=title, width=width)
    for column in COLUMNS:
        shown.add_column(column, justify="left" if "takes" in column else "right")
    for row in found:
        shown.add_row(*(f"{row[name]:.0%}" if name == "loss" else str(row[name]) for name in COLUMNS.values()))
    return shown


COLUMNS = {
    "shape": "shape", "tokens": "tokens", "form": "form", "model takes": "model", "ms": "ms",
    "model's ms, projections": "model_ms", "max-autotune takes": "measured", "its ms": "measured_ms", "loss": "loss",
}  # fmt: skip
