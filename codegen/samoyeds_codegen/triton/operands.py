"""Operands of kernels: weights as pointers and strides, by the names that parameters have in the text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from samoyeds_codegen.triton.matrices import Matrices
from samoyeds_codegen.triton.spec import Pattern

Stack = Tensor | Matrices
"""Matrices of all experts: [E, rows, cols], or each wherever it lies."""


@dataclass(frozen=True)
class DenseSide:
    """A dense weight of all experts.

    Attributes:
        weight: [E, rows, cols] by any strides; gate and up of one parameter are two views of it. Or matrices apart.
        bias: [E, rows], floating, by any strides; None if there is none.
    """

    weight: Stack
    bias: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.weight.shape[0]

    @property
    def rows(self) -> int:
        """Output features."""
        return self.weight.shape[1]

    @property
    def stored(self) -> dict[str, Stack]:
        """What a kernel reads, but for the bias."""
        return {"weight": self.weight}

    def half(self, index: int, alternate: bool) -> DenseSide:
        """Gate (0) or up (1) of a parameter that has both, in halves or in alternate rows; a view."""
        bias = None if self.bias is None else _half(self.bias, index, alternate)
        return DenseSide(_half(self.weight, index, alternate), bias)

    def arguments(self, side: str) -> dict[str, Any]:
        """Pointer and strides, but for the bias."""
        first, where = _place(side, self.weight)
        row, col = first.stride()[-2:]
        return where | {f"{side}_row": row, f"{side}_col": col}


@dataclass(frozen=True)
class PackedSide:
    """A packed weight of all experts, in canonical storage (see ``PackedWeight``), in stacks or apart.

    Attributes:
        values: [E, R, C / 2], rows contiguous; R may be the part of a stack that is the gate, or the up projection.
        metadata: int16 [E, R, C / 16], rows contiguous.
        selection: uint8 [E, whole R / group, C / vector], rows contiguous; None where all sub-rows are kept.
        pattern: of the weight.
        rows: output features.
        first_block: the block of ``selection`` at which ``values`` begin.
        bias: [E, rows]; None if there is none.
    """

    values: Stack
    metadata: Stack
    selection: Stack | None
    pattern: Pattern
    rows: int
    first_block: int = 0
    bias: Tensor | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.values.shape[0]

    @property
    def stored(self) -> dict[str, Stack]:
        """What a kernel reads, but for the bias."""
        found = {"values": self.values, "metadata": self.metadata, "selection": self.selection}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def half(self, index: int, alternate: bool) -> PackedSide:
        """Gate (0) or up (1) of a storage that has both, all gate rows first; only its bias may ``alternate``.

        The gate must be whole blocks of rows.
        """
        rows, bias = self.rows // 2, self.bias
        block = index * rows // self.pattern.m
        start, count = block * self.pattern.n, -(-rows // self.pattern.m) * self.pattern.n
        return replace(
            self,
            values=_narrow(self.values, start, count),
            metadata=_narrow(self.metadata, start, count),
            rows=rows,
            first_block=block,
            bias=None if bias is None else _half(bias, index, alternate),
        )

    def arguments(self, side: str) -> dict[str, Any]:
        """Pointers and strides, but for the bias."""
        found: dict[str, Any] = {}
        for name, tensor in self.stored.items():
            first, where = _place(f"{side}_{name}", tensor)
            found |= where | {f"{side}_{name}_row": first.stride(-2)}
        if self.selection is not None:
            found[f"{side}_first_block"] = self.first_block
        return found


Side = DenseSide | PackedSide


def bias_arguments(side: str, bias: Tensor | None) -> dict[str, Any]:
    """Pointer and strides of a bias [E, rows]."""
    expert, row = (0, 0) if bias is None else bias.stride()
    return {f"{side.upper()}_BIAS": bias, f"{side}_bias_expert": expert, f"{side}_bias_row": row}


def _place(name: str, of: Stack) -> tuple[Tensor, dict[str, Any]]:
    """A tensor with the strides of an expert's matrix, and what says where each of them begins."""
    if isinstance(of, Matrices):
        return of.first, {name.upper(): of.first, f"{name.upper()}_TABLE": of.table, f"{name}_unit": of.unit}
    return of, {name.upper(): of, f"{name}_expert": of.stride(0)}


def _narrow(of: Stack, start: int, rows: int) -> Stack:
    return of.narrow(start, rows) if isinstance(of, Matrices) else of.narrow(1, start, rows)


def _half(tensor: Any, index: int, alternate: bool) -> Any:
    """Half of the rows of [E, rows, ...]."""
    if isinstance(tensor, Matrices):
        return tensor.half(index, alternate)
    return tensor[:, index::2] if alternate else tensor.chunk(2, dim=1)[index]
