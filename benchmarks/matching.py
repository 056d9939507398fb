"""How matching time grows with the graph: loops over separate experts, unrolled, for more and more experts and layers.

    python -m benchmarks.matching              # writes benchmarks/results/matching.json and matching.png

Every layer is the loop of transformers 4.x Mixtral over E separate experts, which Dynamo unrolls into 22 nodes an
expert. Timed are our own steps alone, reading the graph and matching it, each figure the median of several runs; the
processor's time beside what elapsed tells how much of it other work on the machine took.

Dynamo takes far longer than linear to trace such a model (minutes for 128 experts x 4 layers), so only graphs of one
layer and one of four are traced whole. For the others one layer is traced and its nodes are copied for every further
layer, each copy with parameters, fake tensors and symbols of its own (`benchmarks.replicate`). Before anything is
measured, the graph so made of 4 experts x 3 layers is compared with the trace of the whole model: every value that we
read and every region that we match must be the same. Each row says how its graph was made; 32 experts x 4 layers are
measured both ways.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from benchmarks.common import RESULTS, machine, save
from benchmarks.replicate import Replica, described
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.match.driver import match_regions

WHOLE, REPLICATED = "traced whole", "one layer traced, replicated"
SIZES = (
    (8, 1, WHOLE), (32, 1, WHOLE), (32, 4, WHOLE), (32, 4, REPLICATED), (128, 1, WHOLE), (128, 2, REPLICATED),
    (128, 4, REPLICATED), (128, 8, REPLICATED), (128, 16, REPLICATED), (128, 24, REPLICATED),
)  # fmt: skip
"""(experts, layers, how the graph is made)."""

CHECKED = (4, 3)
"""(experts, layers) of the graph that is made both ways and compared."""


class Expert(nn.Module):
    """A gated expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, H] -> [n, H]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class Loop(nn.Module):
    """One layer: a router and a loop over its experts."""

    def __init__(self, experts: int, hidden: int = 16, width: int = 24, top_k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, width) for _ in range(experts))
        self.top_k = top_k

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        weights, ids = self.gate(x).softmax(-1).topk(self.top_k, -1)
        mask = F.one_hot(ids, len(self.experts)).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return x + out


def trace(experts: int, layers: int) -> fx.GraphModule:
    """Dynamo's graph of a whole model."""
    captured: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        captured.append(gm)
        return gm.forward

    torch._dynamo.reset()
    settings = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with settings, torch.no_grad():
        torch.compile(nn.Sequential(*(Loop(experts) for _ in range(layers))), backend=backend)(torch.randn(8, 16))
    return captured[0]


def make(experts: int, layers: int, how: str) -> fx.GraphModule:
    """A graph by either way."""
    return trace(experts, layers) if how == WHOLE else Replica(trace(experts, 1)).graph(layers)


def check_replica(experts: int, layers: int) -> str:
    """Compare a replicated graph with the trace of the whole model; says what was compared."""
    traced, replicated = (read_graphs(make(experts, layers, how))[0] for how in (WHOLE, REPLICATED))
    regions = match_regions([traced])[0]
    assert len(regions) == layers
    assert described(traced, regions) == described(replicated, match_regions([replicated])[0])
    return f"{experts} experts x {layers} layers: the same {len(traced.values)} values and {layers} regions both ways"


def measure(experts: int, layers: int, how: str, runs: int) -> dict[str, Any]:
    """Seconds to read and to match one graph: medians, and every run."""
    start = time.perf_counter()
    module = make(experts, layers, how)
    made = time.perf_counter() - start
    load = os.getloadavg()[0]
    times = [_timed(module, layers) for _ in range(runs)]
    nodes = len(module.graph.nodes)
    read, match, total, cpu = (statistics.median(t[i] for t in times) for i in range(4))
    return {
        "experts": experts, "layers": layers, "graph": how, "nodes": nodes, "read_s": round(read, 4),
        "match_s": round(match, 4), "total_s": round(total, 4), "cpu_s": round(cpu, 4),
        "us_per_node": round(total / nodes * 1e6, 1), "cpu_us_per_node": round(cpu / nodes * 1e6, 1),
        "total_s_of_each_run": [round(t[2], 4) for t in times], "load_average": round(load, 2),
        "making_the_graph_s": round(made, 1),
    }  # fmt: skip


def _timed(module: fx.GraphModule, layers: int) -> tuple[float, float, float, float]:
    """Seconds to read, to match, to do both, and of the processor."""
    gc.collect()  # what tracing left behind is not ours
    start, cpu = time.perf_counter(), time.process_time()
    graphs = read_graphs(module)
    read = time.perf_counter()
    regions, misses = match_regions(graphs)
    end, cpu_end = time.perf_counter(), time.process_time()
    assert len(regions) == layers and not misses, (len(regions), misses)
    return read - start, end - read, end - start, cpu_end - cpu


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over nodes, with linear growth for comparison; below, time per node."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (times, rates) = plt.subplots(2, sharex=True, figsize=(7.2, 6.6), height_ratios=(3, 1.4))
    ends = min(row["nodes"] for row in rows), max(row["nodes"] for row in rows)
    rate = rows[-1]["cpu_s"] / rows[-1]["nodes"]
    reference = {"color": "0.6", "lw": 1, "label": f"linear: {rate * 1e6:.0f} µs per node, as of the largest graph"}
    times.plot(ends, [rate * n for n in ends], **reference)
    rates.axhline(rate * 1e6, **reference)
    panels = (
        (times, "total_s", "C0", 7, "elapsed"), (times, "cpu_s", "C1", 4, "processor time"),
        (rates, "us_per_node", "C0", 7, "elapsed"), (rates, "cpu_us_per_node", "C1", 4, "processor time"),
    )  # fmt: skip
    for axes, key, color, size, name in panels:
        for how, marker in ((WHOLE, "o"), (REPLICATED, "s")):
            points = [(row["nodes"], row[key]) for row in rows if row["graph"] == how]
            style = {"color": color, "ms": size, "mfc": "none", "label": f"{name} ({how})"}
            axes.plot(*zip(*points, strict=True), marker, **style)
    _name_points(times, rows)
    times.set(xscale="log", yscale="log", ylabel="seconds (median of the runs)")
    times.set_title("Reading and matching unrolled loops: experts × layers")
    times.set(xlim=(0.45 * ends[0], 1.5 * ends[1]), ylim=(None, 2 * max(row["total_s"] for row in rows)))
    rates.set(xlabel="nodes of the graph", ylabel="µs per node", ylim=(0, 1.2 * max(r["us_per_node"] for r in rows)))
    times.legend(fontsize=8, loc="lower right")
    times.grid(alpha=0.3)
    rates.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _name_points(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Experts and layers beside each point; of points too near to tell apart, together."""
    groups: list[list[dict[str, Any]]] = []
    for row in sorted(rows, key=lambda r: r["nodes"]):
        if groups and row["nodes"] < 1.1 * groups[-1][0]["nodes"]:
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        name = ", ".join(dict.fromkeys(f"{row['experts']} × {row['layers']}" for row in group))
        at = group[0]["nodes"], max(row["total_s"] for row in group)
        axes.annotate(name, at, (-7, 5), textcoords="offset points", ha="right", size=8)


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    where = {**machine(), "replication_checked": check_replica(*CHECKED)}
    print(where["replication_checked"], flush=True)
    rows = []
    for experts, layers, how in SIZES:
        rows.append(measure(experts, layers, how, arguments.runs))
        print(rows[-1], flush=True)
    save("matching", rows, where)
    plot(rows, RESULTS / "matching.png")


if __name__ == "__main__":
    main()
