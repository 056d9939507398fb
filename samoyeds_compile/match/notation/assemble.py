"""Projections of all experts out of what was read of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samoyeds_compile.match.notation.experts import ExpertFunction
from samoyeds_compile.match.notation.projections import Bias, Projection
from samoyeds_compile.match.region import Derived, Linear, Operand, require

Numbered = Sequence[tuple[int | None, ExpertFunction]]
"""Functions by the number of their expert; one without number stands for all."""


def linears(functions: Numbered) -> tuple[Linear | None, Linear, Linear]:
    """(gate, up, down) of all experts.

    Raises:
        Decline: they do not fit each other.
    """
    up, down = (_linear(functions, name) for name in ("up", "down"))
    gate = _linear(functions, "gate") if functions[0][1].gate is not None else None
    for p in (up, gate):
        if p is not None:
            at = p.weights[0]
            require(p.num_experts == down.num_experts, "projections have different numbers of experts", at)
            require(p.compute_dtype == down.compute_dtype, "projections compute in different dtypes", at)
    return gate, up, down


def _linear(functions: Numbered, name: str) -> Linear:
    ordered = sorted(functions, key=lambda f: f[0] or 0)
    projections: list[Projection] = [getattr(function, name) for _, function in ordered]
    first = projections[0]
    separate = first.weight.expert is None
    weights = tuple(p.weight.value for p in projections) if separate else (first.weight.value,)
    require(not separate or len(set(weights)) == len(weights), "experts share a weight", weights[0])
    assert first.product.dtype is not None
    bias = _bias([p.bias for p in projections])
    return Linear(weights, bias, first.weight.transposed, first.product, first.product.dtype)


def _bias(biases: list[Bias | None]) -> Operand | None:
    first = biases[0]
    if first is None:
        return None
    if first.expert is not None:
        return first.value
    return Derived(torch.stack, (tuple(b.value for b in biases if b is not None),))
