"""Stacks [E, H, 2 I] and [E, I, H] of a module that takes one batch of rows for each expert, [E · T, H]: llama4.

Rows are scaled by their routing weights before, and those of tokens that are not routed to an expert are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from samoyeds_compile.sparsity.experts.stacks import ROUTED, arguments_of, gate_of, gate_up_down
from samoyeds_compile.sparsity.projections import Block, Stack, Tokens


def batched(name: str, module: nn.Module) -> list[Block]:
    """The block of a module whose only argument are the rows."""
    found = gate_up_down(name, module, transposed=True)
    if found is None or found[0].experts != found[1].experts or arguments_of(module) != ROUTED[:1]:
        return []
    stack = Stack(_rows(found[0].experts), gate_of(module))
    return [Block(name, module, name, found, frozenset(), stack)]


def _rows(experts: int) -> Tokens:
    """Rows that are not zero; their weights are in them already."""

    def tokens(hidden_states: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        for expert, rows in enumerate(hidden_states.view(experts, -1, hidden_states.shape[-1])):
            x = rows[rows.any(dim=-1)]
            yield expert, x, x.new_ones(len(x))

    return tokens
