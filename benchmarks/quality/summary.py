"""Rows of all seeds as one table."""

from __future__ import annotations

import statistics
from typing import Any

KEYS = ("when", "pattern", "method", "permute", "training", "distill")


def summary(seeds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each measured model: its perplexities, and how much above the dense model's of the same seed.

    A model that was trained on is compared with the dense one after the same extra steps.
    """
    by_name = [{row["name"]: row for row in rows} for rows in seeds]
    found = []
    for name, first in by_name[0].items():
        dense = _dense(seeds[0], first["when"])
        perplexities = [rows[name]["perplexity"] for rows in by_name]
        above = [100 * (rows[name]["perplexity"] / rows[dense]["perplexity"] - 1) for rows in by_name]
        found.append({
            **{key: first[key] for key in KEYS},
            "perplexity": perplexities, "above_dense_percent": [round(value, 2) for value in above],
            "mean_percent": round(statistics.mean(above), 2),
        })  # fmt: skip
    return found


def _dense(rows: list[dict[str, Any]], when: str) -> str:
    """Name of the dense row to compare with; what has none was not trained on."""
    names = {row["when"]: str(row["name"]) for row in rows if row["pattern"] == "dense"}
    return names.get(when, names["one-shot"])


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| when | pattern | method | perplexity | above dense |", "|---|---|---|---|---|"]
    for row in rows:
        extras = [key for key in ("permute", "distill") if row[key]] + ["SR-STE"] * (row["training"] == "sr_ste")
        method = ", ".join([row["method"], *extras])
        found, above = statistics.mean(row["perplexity"]), row["above_dense_percent"]
        spread = f"{row['mean_percent']:+.1f} % ({min(above):+.1f} to {max(above):+.1f})"
        lines.append(f"| {row['when']} | {row['pattern']} | {method} | {found:.2f} | {spread} |")
    return "\n".join(lines)
