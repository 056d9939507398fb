"""Stacks [E, 2 I, H] and [E, H, I] of a module that nobody decorated but that takes tokens by ids as decorated ones do.

Such are step3p7 and longcat_flash. The latter's last ids name experts that pass their token on: these have no matrix in
``down_proj``, and one in ``gate_up_proj`` that nothing reads.
"""

from __future__ import annotations

from torch import nn

from samoyeds_compile.sparsity.experts.stacks import ROUTED, arguments_of, by_ids, gate_of, gate_up_down
from samoyeds_compile.sparsity.projections import Block, Stack


def undecorated(name: str, module: nn.Module) -> list[Block]:
    """The block of a module with the names, shapes and arguments of a decorated one of the default layout."""
    found = gate_up_down(name, module, transposed=False)
    if found is None or arguments_of(module)[1:] != ROUTED[1:]:
        return []
    up, down = found
    passing = any(isinstance(child, nn.Identity) for child in module.children())
    if up.experts != down.experts and not (passing and up.experts > down.experts):
        return []
    stack = Stack(by_ids(module, down.experts), gate_of(module))
    return [Block(name, module, name, found, frozenset(), stack)]
