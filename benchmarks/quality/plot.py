"""The figure: what each pattern and method costs, and the training curves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

COLORS = {"magnitude": "C7", "wanda": "C0", "router_wanda": "C3", "second_order": "C2"}


def plot(rows: list[dict[str, Any]], curves: list[dict[str, Any]], path: Path) -> None:
    """Perplexity above dense, one-shot and recovered; below, the loss while the dense models were trained."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(9, 12.5), height_ratios=(3, 3, 1.6))
    _oneshot(axes[0], [row for row in rows if row["when"] == "one-shot" and row["pattern"] != "dense"])
    _recovered(axes[1], [row for row in rows if row["when"] == "recovered" and row["pattern"] != "dense"])
    for curve in curves:
        steps, values = zip(*curve["perplexity"], strict=True)
        axes[2].plot(steps, values, label=f"seed {curve['seed']}")
    axes[2].set(
        xlabel="training step", ylabel="held-out perplexity", yscale="log", title="Training of the dense models"
    )
    axes[2].legend(fontsize=8)
    axes[2].grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _oneshot(axes: Any, rows: list[dict[str, Any]]) -> None:
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    for row in rows:
        method = row["method"].split(",")[0]
        marker = "D" if "refined" in row["method"] else "^" if row["permute"] else "o"
        offset = 0.16 * (list(COLORS).index(method) - 1.5)
        above = row["above_dense_percent"]
        at = patterns.index(row["pattern"]) + offset
        axes.plot([at] * len(above), above, marker, color=COLORS[method], ms=4.5, mfc="none", mew=1, lw=0)
    for method, color in COLORS.items():
        axes.plot([], [], "o", color=color, mfc="none", label=method)
    for marker, name in (("^", "features permuted"), ("D", "mask refined")):
        axes.plot([], [], marker, color="k", mfc="none", label=name)
    axes.axhline(5, color="0.6", lw=1, ls="--")
    axes.set_xticks(range(len(patterns)), patterns, rotation=40, ha="right", fontsize=8)
    axes.set(yscale="log", ylabel="perplexity above dense, %", title="One-shot (each mark is a seed; dashed: 5 %)")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3, axis="y", which="both")


def _recovered(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [_name(row) for row in rows]
    for at, row in enumerate(rows):
        above = row["above_dense_percent"]
        axes.plot(above, [at] * len(above), "o", color="C0", ms=4.5, mfc="none", lw=0)
        axes.plot([statistics.mean(above)], [at], "|", color="k", ms=12)
    axes.axvline(3, color="0.6", lw=1, ls="--")
    axes.axvline(0, color="0.6", lw=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(
        xlabel="perplexity above the dense model after the same extra steps, %",
        title="After training that recovers (circles: seeds; bar: mean; dashed: 3 %)",
    )
    axes.grid(alpha=0.3, axis="x")


def _name(row: dict[str, Any]) -> str:
    extras = [key for key in ("permute", "distill") if row[key]] + ["SR-STE"] * (row["training"] == "sr_ste")
    return ", ".join([row["pattern"], row["method"], *extras])
