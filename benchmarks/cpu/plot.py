"""The figure: ratios by number of tokens, and where the arms lie under the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu.arms import BEST, INDUCTOR
from benchmarks.cpu.point import Row
from benchmarks.cpu.shapes import SHAPES

TICKS = (0.25, 0.5, 1, 2, 4, 8, 16)
STYLES = {INDUCTOR: "-o", BEST: "--^"}


def plot(content: dict[str, Any], path: Path) -> None:
    """A row of panels for each dtype and number of threads, a column for each shape; the roofline comes last."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = content["rows"]
    groups = sorted({(row["threads"], row["dtype"]) for row in rows})
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    arms = list(dict.fromkeys(arm for row in rows for arm in row["ratio"]))
    colors = {arm: f"C{number}" for number, arm in enumerate(arms)}
    shown = [ratios[peer] for row in rows for ratios in row["ratio"].values() for peer in STYLES if peer in ratios]
    limits = min([*shown, 0.9]) / 1.1, max([*shown, 1.1]) * 1.1
    size = (3.7 * (len(shapes) + 1), 3.1 * len(groups) + 0.6)
    figure, axes = plt.subplots(len(groups), len(shapes) + 1, figsize=size, squeeze=False, layout="constrained")
    for line, (threads, dtype) in zip(axes, groups, strict=True):
        of_group = [row for row in rows if (row["threads"], row["dtype"]) == (threads, dtype)]
        for panel, shape in zip(line, shapes, strict=False):
            _ratios(panel, [row for row in of_group if row["shape"] == shape], colors)
            panel.set_ylim(*limits)
            panel.set_title(f"{SHAPES[shape].title}\n{dtype}, {threads} thread{'s' * (threads > 1)}", fontsize=8)
        line[0].set_ylabel("peer's time by ours", fontsize=8)
        _under_roofline(line[-1], of_group, content["rooflines"][str(threads)], dtype, colors)
    for arm, color in colors.items():
        axes[0][0].plot([], [], color=color, label=arm)
    for peer, style in STYLES.items():
        axes[0][0].plot([], [], style, color="k", ms=3, label=f"against {peer}")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _ratios(panel: Any, rows: Sequence[Row], colors: dict[str, str]) -> None:
    for arm, color in colors.items():
        for peer, style in STYLES.items():
            points = [(r["tokens"], r["ratio"][arm][peer]) for r in rows if peer in r["ratio"].get(arm, {})]
            if points:
                panel.plot(*zip(*sorted(points), strict=True), style, color=color, ms=3, lw=1.1)
    panel.axhline(1, color="0.5", lw=0.8)
    panel.set(xscale="log", yscale="log")
    ticks = sorted({row["tokens"] for row in rows})
    panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
    panel.set_xticks([], minor=True)
    panel.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS], fontsize=7)
    panel.set_yticks([], minor=True)
    panel.set_xlabel("tokens", fontsize=8)
    panel.grid(alpha=0.3)


def _under_roofline(
    panel: Any, rows: Sequence[Row], roofline: dict[str, Any], dtype: str, colors: dict[str, str]
) -> None:
    """GF/s of kept weights by operations for a byte; grey: the fastest dense library."""
    peak = max(roofline["amx"], roofline.get("pairs", 0), roofline["fma"]) if dtype == "bf16" else roofline["fma"]
    points = {arm: [_place(row, arm) for row in rows if arm in row["rate"]] for arm in colors}
    points[BEST] = [_place(row, row[BEST]) for row in rows if row[BEST]]
    for arm, places in points.items():
        if places:
            panel.plot(*zip(*places, strict=True), "o", color=colors.get(arm, "0.6"), ms=3, lw=0)
    intensities = [place[0] for places in points.values() for place in places]
    low, high = min(intensities, default=1) / 2, max([*intensities, peak / roofline["read"]]) * 2
    panel.plot([low, peak / roofline["read"], high], [low * roofline["read"], peak, peak], color="k", lw=1)
    panel.set(xscale="log", yscale="log")
    panel.set_xlabel("operations for a byte", fontsize=8)
    panel.set_ylabel("GF/s", fontsize=8)
    panel.set_title("under the roofline (grey: best dense)", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)


def _place(row: Row, arm: str) -> tuple[float, float]:
    rate = row["rate"][arm]
    return rate["GF/s"] / rate["GB/s"], rate["GF/s"]
