"""A cost model of expert parallelism: bytes of an all-to-all, what can overlap, where experts fit.

    python examples/scaling.py

It is a model and no measurement: figures of data sheets in, arithmetic, a table out. docs/scaling.md explains it, and
has that table. Shapes: T tokens a GPU, H hidden size, I expert width, E experts, K experts a token, P ranks that share
the experts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """Per GPU: bytes a second to its own node and to others (one direction), seconds a message, FLOP/s, bytes."""

    node: int = 8
    within: float = 450e9
    between: float = 50e9
    latency: float = 5e-6
    flops: float = 400e12
    memory: float = 80e9


@dataclass(frozen=True)
class Experts:
    """The experts of all layers; ``tokens`` is T; ``layers`` have experts; values of ``size`` bytes."""

    tokens: int = 4096
    hidden: int = 7168
    width: int = 2048
    experts: int = 256
    top_k: int = 8
    layers: int = 58
    size: int = 2

    def weight_bytes(self, ranks: int, share: float = 1.0) -> float:
        """Of the weights that one of ``ranks`` holds; ``share``: packed bytes for each dense byte."""
        return 3 * self.hidden * self.width * self.experts * self.layers * self.size * share / ranks


def exchanged_bytes(experts: Experts, cluster: Cluster, ranks: int) -> tuple[float, float]:
    """What a GPU sends in one all-to-all: (to its own node, to other nodes).

    Routing is even, and a row is sent once for each of its K experts, as transformers and torchtitan do.
    """
    rows = experts.tokens * experts.top_k * experts.hidden * experts.size
    near = min(ranks, cluster.node)
    return rows * (near - 1) / ranks, rows * (ranks - near) / ranks


def exchange_seconds(experts: Experts, cluster: Cluster, ranks: int, hottest: float = 1.0) -> float:
    """Of one all-to-all; ``hottest``: rows of the busiest rank for each row of an average one, for whom all wait."""
    within, between = exchanged_bytes(experts, cluster, ranks)
    slowest = max(within / cluster.within, between / cluster.between)
    return hottest * slowest + (ranks - 1) * cluster.latency


def product_seconds(experts: Experts, cluster: Cluster, hottest: float = 1.0) -> float:
    """Of the three products of a layer, forward; backward takes twice as long."""
    return hottest * 6 * experts.tokens * experts.top_k * experts.hidden * experts.width / cluster.flops


def layer_seconds(experts: Experts, cluster: Cluster, ranks: int, chunks: int = 1) -> float:
    """Forward of one layer: two exchanges and the products, the tokens in ``chunks`` that overlap each other.

    With one chunk nothing overlaps; with many, the longer of the two hides all but a chunk of the other. Each chunk
    pays the latency of its own messages.
    """
    sent = 2 * (exchange_seconds(experts, cluster, ranks) + (chunks - 1) * (ranks - 1) * cluster.latency)
    computed = product_seconds(experts, cluster)
    return max(sent, computed) + min(sent, computed) / chunks


def fewest_ranks(experts: Experts, cluster: Cluster, share: float = 1.0, room: float = 0.5) -> int:
    """The smallest power of two of ranks of which each holds its weights in ``room`` of its memory."""
    ranks = 1
    while experts.weight_bytes(ranks, share) > room * cluster.memory:
        ranks *= 2
    return ranks


def gradient_bytes(experts: Experts, gpus: int, ranks: int) -> float:
    """What a GPU sends to sum the experts' gradients over their ``gpus / ranks`` copies, in a step (ring)."""
    copies = gpus // ranks
    return 2 * (copies - 1) / copies * experts.weight_bytes(ranks)


def row(gpus: int, ranks: int, experts: Experts, cluster: Cluster) -> str:
    """One line of the table."""
    within, between = exchanged_bytes(experts, cluster, ranks)
    apart, overlapped = (1e3 * layer_seconds(experts, cluster, ranks, chunks) for chunks in (1, 4))
    cells = [
        f"{gpus:,}", f"{ranks}", f"{experts.experts // ranks}", f"{within / 1e6:.0f}", f"{between / 1e6:.0f}",
        f"{1e3 * exchange_seconds(experts, cluster, ranks):.2f}", f"{1e3 * product_seconds(experts, cluster):.2f}",
        f"{apart:.2f}", f"{overlapped:.2f}", f"{experts.weight_bytes(ranks) / 1e9:.1f}",
        f"{gradient_bytes(experts, gpus, ranks) / 1e9:.1f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEADER = (
    "| GPUs | P | experts a GPU | MB to own node | MB to others | exchange, ms | products, ms | layer, ms "
    "| in 4 chunks, ms | weights, GB | gradients, GB |\n" + "|---" * 11 + "|"
)
PLACEMENTS = [(gpus, ranks) for gpus in (64, 128, 256, 512, 1024) for ranks in (8, 64, 256) if ranks <= gpus]


def table(experts: Experts | None = None, cluster: Cluster | None = None) -> str:
    """Placements on 64 to 1,024 GPUs, as Markdown."""
    chosen, machine = experts or Experts(), cluster or Cluster()
    return "\n".join([HEADER, *(row(gpus, ranks, chosen, machine) for gpus, ranks in PLACEMENTS)])


if __name__ == "__main__":
    print(table())
    for name, share in (("dense", 1.0), ("2:4, packed", 0.563), ("75 %, packed", 0.289)):
        print(f"{name}: {fewest_ranks(Experts(), Cluster(), share)} ranks at least")
