"""Figures of benchmarks that draw none themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.page.table import Content, Row, two_digits


def figure_of(stem: str) -> Callable[[Sequence[Any], Content], None] | None:
    """What draws the figure of a file, by the first part of its name."""
    return FIGURES.get(stem.partition("_")[0])


def draw(path: Path) -> None:
    """``<stem>.png`` beside ``<stem>.json``, of which there has to be a figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    FIGURES[path.stem.partition("_")[0]](axes, json.loads(path.read_text(encoding="utf-8")))
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _layout(axes: Sequence[Any], content: Content) -> None:
    """A panel for each peer, a line for each block."""
    lines = list(dict.fromkeys((p["model"], p["dtype"], p["pattern"]) for p in content["points"]))
    titles = {"off": "token-major rows on every edge", "worst": "the dearest choice"}
    for panel, (arm, title) in zip(axes, titles.items(), strict=True):
        for number, line in enumerate(lines):
            points = [p for p in content["points"] if (p["model"], p["dtype"], p["pattern"]) == line]
            tokens, ratios = zip(*[(p["tokens"], p["ratios"][f"{arm}/on"]) for p in points], strict=True)
            panel.plot(tokens, ratios, "-o" if line[2] == "dense" else "--^", ms=3, lw=1.1, color=f"C{number // 2}",
                       label=", ".join(line))  # fmt: skip
        panel.axhline(1, color="0.5", lw=0.8)
        panel.set(xscale="log")
        panel.set_xticks(tokens, [f"{count:,}" for count in tokens], fontsize=7)
        panel.set_xticks([], minor=True)
        panel.tick_params(labelsize=7)
        panel.set_xlabel("tokens", fontsize=8)
        panel.set_ylabel("time by that of layouts by cost", fontsize=8)
        panel.set_title(title, fontsize=8)
        panel.grid(alpha=0.3)
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)


def _training(axes: Sequence[Any], content: Content) -> None:
    """Time and memory, a bar for each row."""
    rows: Sequence[Row] = content["rows"]
    names = [f"{row['model']}, {row['dtype']}, {row['weights']}" for row in rows]
    for panel, (key, title) in zip(axes, {"ratio": "time", "memory_ratio": "peak memory"}.items(), strict=True):
        values = [row[key] for row in rows]
        colors = ["C0" if row["weights"] == "dense" else "C1" for row in rows]
        bars = panel.barh(names, [value - 1 for value in values], left=1, color=colors)
        panel.bar_label(bars, [two_digits(value) for value in values], fontsize=7, padding=2)
        panel.axvline(1, color="0.5", lw=0.8)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.tick_params(labelsize=7)
        panel.set_title(f"a step of training, {title}: Inductor's by ours", fontsize=8)
        panel.grid(alpha=0.3, axis="x")


FIGURES = {"layout": _layout, "training": _training}
