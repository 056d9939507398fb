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

    figure, axes = plt.subplots(3, 1, figsize=(9, 15), height_ratios=(3, 5, 1.6))
    sparse = [row for row in rows if not row["pattern"].startswith("dense")]
    _oneshot(axes[0], [row for row in sparse if row["when"] == "one-shot"])
    _fitted(axes[1], [row for row in sparse if row["when"] != "one-shot"])
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


def _fitted(axes: Any, rows: list[dict[str, Any]]) -> None:
    whens = list(dict.fromkeys(row["when"] for row in rows))
    for at, row in enumerate(rows):
        above, color = row["above_dense_percent"], f"C{whens.index(row['when'])}"
        axes.plot(above, [at] * len(above), "o", color=color, ms=4.5, mfc="none", lw=0)
        axes.plot([statistics.mean(above)], [at], "|", color="k", ms=12)
    for at, when in enumerate(whens):
        axes.plot([], [], "o", color=f"C{at}", mfc="none", label=when)
    for goal in (0, 3, 5):
        axes.axvline(goal, color="0.6", lw=1, ls="--" if goal else "-")
    axes.set_xscale("symlog", linthresh=10)
    ticks = [0, 3, 5, 10, 20, 50]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_yticks(range(len(rows)), map(_name, rows), fontsize=8)
    axes.invert_yaxis()
    axes.set(
        xlabel="perplexity above dense after the same extra steps, %",
        title="After reconstruction or training (circles: seeds; bar: mean; dashed: 3 and 5 %)",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, axis="x")


def _name(row: dict[str, Any]) -> str:
    extras = [key for key in ("permute", "distill") if row[key]] + ["SR-STE"] * (row["training"] == "sr_ste")
    return ", ".join([row["pattern"], row["method"], *extras])
