"""How matching time grows with the graph: loops over separate experts, unrolled, for more and more experts and layers.

    python -m benchmarks.matching              # writes benchmarks/results/matching.json and matching.png

Every layer is the loop of transformers 4.x Mixtral over E separate experts, which Dynamo unrolls into about 24 nodes an
expert. Timed are our own steps alone (reading the graph and matching), once per graph, after a warm-up on a small one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from benchmarks.common import RESULTS, machine, save
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.match.driver import match_regions

SIZES = ((8, 1), (32, 1), (128, 1), (128, 2), (128, 4), (128, 8))
LARGE = (128, 24)
"""(experts, layers)."""


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


def measure(experts: int, layers: int) -> dict[str, Any]:
    """Seconds to read and to match one graph."""
    model = nn.Sequential(*(Loop(experts) for _ in range(layers)))
    found: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        start = time.perf_counter()
        graphs = read_graphs(gm)
        read = time.perf_counter()
        regions, misses = match_regions(graphs)
        end = time.perf_counter()
        assert len(regions) == layers and not misses, (len(regions), misses)
        found.update(nodes=len(gm.graph.nodes), read_s=round(read - start, 4), match_s=round(end - read, 4))
        return gm.forward

    torch._dynamo.reset()
    settings = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True)
    with settings, torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(8, 16))
    return {"experts": experts, "layers": layers, **found}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds over nodes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    nodes = [row["nodes"] for row in rows]
    axes.plot(nodes, [row["read_s"] + row["match_s"] for row in rows], "o-", label="read and match")
    axes.plot(nodes, [row["read_s"] for row in rows], "s--", label="read")
    axes.set(xlabel="nodes of the graph", ylabel="seconds", title="Matching unrolled loops over experts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="also 128 experts x 24 layers (Dynamo takes minutes)")
    arguments = parser.parse_args()
    measure(4, 1)
    rows = []
    for experts, layers in (*SIZES, LARGE) if arguments.large else SIZES:
        rows.append(measure(experts, layers))
        print(rows[-1], flush=True)
    save("matching", rows, machine())
    plot(rows, RESULTS / "matching.png")


if __name__ == "__main__":
    main()
