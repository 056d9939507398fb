"""Joined tensors that are no experts' rows."""

import torch

from samoyeds_compile import Report
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.match.notation.index import constant
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.reindex import step


def test_empty_cache():
    """``cat`` skips ``tensor([])`` beside tensors of any rank; the first step of attention with a cache does that."""
    cache, keys, queries = torch.tensor([]), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    report = Report()

    def attend(cache, keys, queries):
        joined = torch.cat([cache, keys], dim=-2)
        scores = queries @ joined.transpose(-1, -2)
        return scores.softmax(-1) @ joined, joined[:, :, 0]

    compiled = torch.compile(attend, backend="samoyeds", options={"base": "eager", "report": report})
    for found, expected in zip(compiled(cache, keys, queries), attend(cache, keys, queries), strict=True):
        torch.testing.assert_close(found, expected)
    assert report.blocks == []


def test_known_position():
    """Which part a position lies in is known only if all parts have its axes."""
    found = []

    def backend(gm, example_inputs):
        (graph,) = read_graphs(gm)
        (joined,) = graph.with_op("cat")
        found.append(step(joined, (constant(0), constant(3)), Notation(graph)))
        return gm.forward

    compiled = torch.compile(lambda a, b: torch.cat([a, b], dim=1), backend=backend)
    compiled(torch.tensor([]), torch.ones(2, 4))
    compiled(torch.ones(2, 1), torch.ones(2, 4))
    assert found[0] is None
    assert found[1][1] == (constant(0), constant(2)) and found[1][0].shape == (2, 4)
