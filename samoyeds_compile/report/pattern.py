"""Pictures of packed weights: a corner of the matrix, with what is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from samoyeds_compile.sparsity.blocks import round_up
from samoyeds_compile.sparsity.pack import PackedWeight, unpack
from samoyeds_compile.sparsity.tensor import PackedTensor

ROWS, COLS = 32, 64
"""Size of the corner, at least; it holds whole groups and vectors of the pattern."""


def pattern_of(weight: PackedTensor, name: str) -> dict[str, Any] | None:
    """The corner of the first expert as digits, ``.`` for what was dropped and 1 to 9 for magnitudes.

    Returns:
        Plain data; None for a weight without values (a fake one, or one on the meta device).
    """
    if isinstance(weight.kept, FakeTensor) or weight.kept.is_meta:
        return None
    with unset_fake_temporarily(), torch.no_grad():
        corner = unpack(_corner(_first(weight).packed)).float().abs().cpu()
    config = weight.form.config
    return {
        "name": name,
        "shape": list(weight.shape),
        "config": {"n": config.n, "m": config.m, "vector": config.vector, "inner": config.inner, "group": config.group},
        "bytes": weight.packed_nbytes,
        "dense_bytes": weight.numel() * weight.element_size(),
        "rows": _digits(corner),
    }


def _first(weight: PackedTensor) -> PackedTensor:
    """The first matrix of a stack."""
    is_stack = weight.dim() == 3 or weight.form.flat
    return weight.with_inner(lambda t: t[0], replace(weight.form, flat=False)) if is_stack else weight


def _corner(packed: PackedWeight) -> PackedWeight:
    config, (rows, cols) = packed.config, packed.shape
    rows, cols = min(rows, round_up(ROWS, config.m * config.group)), min(cols, round_up(COLS, config.vector))
    condensed = round_up(rows, config.m * config.group) * config.n // config.m
    whole = round_up(cols, max(config.vector, 16))

    def cut(tensor: Tensor | None, height: int, width: int) -> Tensor | None:
        return None if tensor is None else tensor[:height, :width]

    values = cut(packed.values, condensed, whole // (2 if config.inner == "2:4" else 1))
    assert values is not None
    metadata = cut(packed.metadata, condensed, whole // 16)
    selection = cut(packed.selection, condensed // config.group, whole // config.vector)
    return PackedWeight(values, metadata, selection, (rows, cols), config)


def _digits(corner: Tensor) -> list[str]:
    largest = float(corner.max()) or 1.0
    levels = (corner / largest * 9).ceil().clamp(max=9).to(torch.int64)
    return ["".join(str(level) if level else "." for level in row) for row in levels.tolist()]
