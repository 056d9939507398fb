"""Stacks of transformers' ``use_experts_implementation``, whose attributes say how they are stored."""

from __future__ import annotations

from typing import Any

from samoyeds_compile.sparsity.experts.stacks import by_ids
from samoyeds_compile.sparsity.projections import Block, Projection, Stack, path

LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What the decorator leaves on a module."""


def decorated(name: str, module: Any) -> list[Block]:
    """The block of a decorated module, [E, 2 I, H] and [E, H, I] or as its attributes say."""
    if not all(hasattr(module, attribute) for attribute in LAYOUT) or not hasattr(module, "down_proj"):
        return []
    up = "gate_up_proj" if module.has_gate else "up_proj"
    projections = tuple(_projection(name, module, attribute) for attribute in (up, "down_proj"))
    between = module._apply_gate if module.has_gate else module.act_fn
    stack = Stack(by_ids(module, projections[0].experts), between)
    return [Block(name, module, name, projections, frozenset(), stack)]


def _projection(name: str, module: Any, attribute: str) -> Projection:
    runs = 2 if attribute == "gate_up_proj" else 1
    return Projection(
        path(name, attribute), module, attribute, "down" if attribute == "down_proj" else "up", stacked=True,
        transposed=bool(module.is_transposed), runs=runs, interleaved=runs == 2 and not module.is_concatenated,
        bias=f"{attribute}_bias" if module.has_bias else None,
    )  # fmt: skip
