"""A line of results: what was measured, and what follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.contender import BLOCK, Contender
from benchmarks.gpu.inputs import Inputs
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import DENSE, Weights

Row = dict[str, Any]


def row_of(
    shape: Shape, weights: Weights, inputs: Inputs, contender: Contender, times: Sequence[float], peak: int
) -> Row:
    """Milliseconds, and the bytes and operations that a call cannot do without.

    Bytes are the weights of experts that have tokens, tokens, and results; rows between projections could stay in a
    cache. Operations are those on values that are kept.
    """
    hit, tokens = inputs.experts_hit(), inputs.x_TH.shape[0]
    stored = weights.nbytes // shape.experts
    return {
        "shape": shape.name, "tokens": tokens, "name": contender.name, "form": contender.form,
        "ours": contender.ours, "work": contender.work, "ms": round(statistics.median(times), 5),
        "rounds": len(times), "spread": round(max(times) / min(times), 3), "experts_hit": hit,
        "bytes": stored * hit + 2 * inputs.x_TH.nbytes,
        "flops": int(2 * inputs.slots * shape.elements * weights.density),
        "weight_bytes": weights.nbytes, "peak_bytes": peak,
    }  # fmt: skip


def with_rates(row: Row, shape: Shape, machine: Mapping[str, Any], rates: tuple[float, float]) -> Row:
    """Achieved TB/s and TFLOP/s, the share of the roofline, and how many tokens fit beside all layers' experts.

    ``largest_batch`` is arithmetic: memory that the experts of all layers leave, over what a call takes for a token.
    """
    seconds, (bandwidth, rate) = row["ms"] / 1e3, rates
    least = max(row["bytes"] / bandwidth, row["flops"] / rate)
    left = machine.get("memory", 0) - shape.layers * row["weight_bytes"]
    each = row["peak_bytes"] / row["tokens"]
    return row | {
        "tb_per_s": round(row["bytes"] / seconds / 1e12, 3),
        "tflop_per_s": round(row["flops"] / seconds / 1e12, 2),
        "roofline_share": round(least / seconds, 3),
        "largest_batch": max(int(left / each), 0) if each else 0,
    }


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Each line with the best dense peer's time over its own, of the same shape and tokens."""
    return [row | _ratio(row, [r for r in rows if _same(r, row)]) for row in rows]


def _ratio(row: Row, others: Sequence[Row]) -> Row:
    peers = [r for r in others if not r["ours"] and r["form"] == DENSE and r["work"] == BLOCK]
    if not peers:
        return {"best_dense": None, "ratio": None}
    best = min(peers, key=lambda r: r["ms"])
    return {"best_dense": best["name"], "ratio": round(best["ms"] / row["ms"], 3)}


def _same(a: Row, b: Row) -> bool:
    return (a["shape"], a["tokens"]) == (b["shape"], b["tokens"])
