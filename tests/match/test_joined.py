"""Joined tensors that are no experts' rows."""

import torch

from samoyeds_compile import Report


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
