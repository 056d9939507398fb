"""Experts that are rows of embeddings: doge. They are vectors, not matrices, so they are refused."""

from __future__ import annotations

from torch import nn


def embedded(module: nn.Module) -> bool:
    """Whether a module holds two ``nn.Embedding`` with a row for each expert."""
    experts = getattr(module, "num_experts", None)
    rows = [child.num_embeddings for child in module.children() if isinstance(child, nn.Embedding)]
    return len(rows) == 2 and all(count == experts for count in rows)
