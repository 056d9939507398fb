"""Two modules with a stack each that take rows sorted by expert, and how many each has: jetmoe.

A module holds both, ``input_linear`` [E, 2 I, H] and ``output_linear`` [E, H, I], an activation and the router that
sorts. Jetmoe's attention has two such modules as well, without a gate between them; it stays dense, as all attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from samoyeds_compile.sparsity.experts.stacks import arguments_of, gated
from samoyeds_compile.sparsity.projections import Block, Projection, Stack, Tokens, path

LINEARS = (("input_linear", "up", 2), ("output_linear", "down", 1))
"""Attribute, role and runs."""


def by_counts(name: str, module: Any) -> list[Block]:
    """The block of a module with both, a router and a gate."""
    if not all(_is_linear(getattr(module, attribute, None)) for attribute, _, _ in LINEARS):
        return []
    if not hasattr(module, "activation") or not isinstance(getattr(module, "router", None), nn.Module):
        return []
    up, down = projections = tuple(
        Projection(path(name, attribute, "weight"), getattr(module, attribute), "weight", role, stacked=True, runs=runs)
        for attribute, role, runs in LINEARS
    )
    if up.experts != down.experts or up.shape != (2 * down.shape[1], down.shape[0]):
        return []
    stack = Stack(_sorted_rows(module.router), gated(module.activation))
    return [Block(name, module, name, projections, frozenset(), stack)]


def _is_linear(module: Any) -> bool:
    if not isinstance(module, nn.Module) or arguments_of(module) != ["inputs", "expert_size"]:
        return False
    held = dict(module.named_parameters())
    return held.keys() == {"weight"} and held["weight"].dim() == 3


def _sorted_rows(router: Any) -> Tokens:
    """Of a call of the module, whose router is asked once more: it draws nothing, and its hooks are not run."""

    def tokens(layer_input: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        x = layer_input.reshape(-1, layer_input.shape[-1])
        _, token, gates, counts, _ = type(router).forward(router, x)
        parts = zip(token.split(counts), gates.split(counts), strict=True)
        for expert, (of_expert, weights) in enumerate(parts):
            yield expert, x[of_expert], weights

    return tokens
