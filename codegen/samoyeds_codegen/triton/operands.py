"""Operands of kernels: weights as pointers and strides, by the names that parameters have in the text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from samoyeds_codegen.triton.spec import Pattern


@dataclass(frozen=True)
class DenseSide:
    """A dense weight of all experts.

    Attributes:
        weight: [E, rows, cols] by any strides; gate and up of one parameter are two views of it.
        bias: [E, rows], floating, by any strides; None if there is none.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def rows(self) -> int:
        """Output features."""
        return self.weight.shape[1]

    @property
    def stored(self) -> dict[str, Tensor]:
        """What a kernel reads, but for the bias."""
        return {"weight": self.weight}

    def half(self, index: int, alternate: bool) -> DenseSide:
        """Gate (0) or up (1) of a parameter that has both, in halves or in alternate rows; a view."""
        bias = None if self.bias is None else _half(self.bias, index, alternate)
        return DenseSide(_half(self.weight, index, alternate), bias)

    def arguments(self, side: str) -> dict[str, Any]:
        """Pointer and strides."""
        strides = dict(zip((f"{side}_expert", f"{side}_row", f"{side}_col"), self.weight.stride(), strict=True))
        return {side.upper(): self.weight, **strides, **_bias(side, self.bias)}


@dataclass(frozen=True)
class PackedSide:
    """A packed weight of all experts, in canonical storage (see ``PackedWeight``).

    Attributes:
        values: [E, R, C / 2], rows contiguous; R may be the part of a stack that is the gate, or the up projection.
        metadata: int16 [E, R, C / 16], rows contiguous.
        selection: uint8 [E, whole R / group, C / vector], rows contiguous; None where all sub-rows are kept.
        pattern: of the weight.
        rows: output features.
        first_block: the block of ``selection`` at which ``values`` begin.
        bias: [E, rows]; None if there is none.
    """

    values: Tensor
    metadata: Tensor
    selection: Tensor | None
    pattern: Pattern
    rows: int
    first_block: int = 0
    bias: Tensor | None = None

    @property
    def stored(self) -> dict[str, Tensor]:
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
            values=self.values.narrow(1, start, count),
            metadata=self.metadata.narrow(1, start, count),
            rows=rows,
            first_block=block,
            bias=None if bias is None else _half(bias, index, alternate),
        )

    def arguments(self, side: str) -> dict[str, Any]:
        """Pointers and strides."""
        found: dict[str, Any] = {}
        for name, tensor in self.stored.items():
            found[f"{side}_{name}".upper()] = tensor
            found[f"{side}_{name}_expert"], found[f"{side}_{name}_row"] = tensor.stride()[:2]
        if self.selection is not None:
            found[f"{side}_first_block"] = self.first_block
        return found | _bias(side, self.bias)


Side = DenseSide | PackedSide


def _half(tensor: Tensor, index: int, alternate: bool) -> Tensor:
    """Half of the rows of [E, rows, ...]."""
    return tensor[:, index::2] if alternate else tensor.chunk(2, dim=1)[index]


def _bias(side: str, bias: Tensor | None) -> dict[str, Any]:
    expert, row = (0, 0) if bias is None else bias.stride()
    return {f"{side.upper()}_BIAS": bias, f"{side}_bias_expert": expert, f"{side}_bias_row": row}
