"""The cost model of docs/scaling.md: what it must give by counting, and the table in the page."""

from pathlib import Path

import pytest
import torch

from examples import scaling
from examples.scaling import Cluster, Experts

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"


def counted(experts: Experts, cluster: Cluster, ranks: int) -> tuple[float, float]:
    """Bytes that rank 0 sends, row by row, where every rank gets as many."""
    ids = torch.arange(experts.tokens * experts.top_k) % experts.experts
    to = ids // (experts.experts // ranks)
    row = experts.hidden * experts.size
    near = (to > 0) & (to < min(ranks, cluster.node))
    return int(near.sum()) * row, int((to >= cluster.node).sum()) * row


@pytest.mark.parametrize("ranks", [1, 2, 8, 16, 64])
def test_bytes_are_those_that_are_counted(ranks: int) -> None:
    experts, cluster = Experts(tokens=64, hidden=32, experts=64), Cluster()
    assert scaling.exchanged_bytes(experts, cluster, ranks) == counted(experts, cluster, ranks)


def test_limits() -> None:
    experts, cluster = Experts(), Cluster(latency=0.0)
    alone = scaling.layer_seconds(experts, cluster, 1)
    assert alone == scaling.product_seconds(experts, cluster)  # nothing is sent
    sent = 2 * scaling.exchange_seconds(experts, cluster, 64)
    assert scaling.layer_seconds(experts, cluster, 64) == pytest.approx(sent + alone)
    assert scaling.layer_seconds(experts, cluster, 64, chunks=10**6) == pytest.approx(max(sent, alone), rel=1e-4)
    assert scaling.gradient_bytes(experts, 64, 64) == 0  # one copy, nothing to sum
    assert scaling.exchange_seconds(experts, cluster, 64, hottest=2) == 2 * scaling.exchange_seconds(
        experts, cluster, 64
    )


def test_weights_are_those_of_the_matrices() -> None:
    experts = Experts(hidden=16, width=24, experts=8, layers=3, size=4)
    stacks = [torch.empty(8, 48, 16), torch.empty(8, 16, 24)] * 3
    assert experts.weight_bytes(1) == sum(s.nbytes for s in stacks) == 4 * experts.weight_bytes(4)
    assert scaling.fewest_ranks(experts, Cluster(memory=experts.weight_bytes(1))) == 2


def test_the_page_has_the_table() -> None:
    text = PAGE.read_text()
    assert scaling.table() in text
    for share, ranks in ((1.0, "dense"), (0.563, "2:4"), (0.289, "75 %")):
        assert f"| {ranks} | {scaling.fewest_ranks(Experts(), Cluster(), share)} |" in text
