"""Operands of kernels: weights as pointers and strides, by the names that parameters have in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
        rows: output features.
        first_block: the block of ``selection`` at which ``values`` begin.
        bias: [E, rows]; None if there is none.
    """

    values: Tensor
    metadata: Tensor
    selection: Tensor | None
    rows: int
    first_block: int = 0
    bias: Tensor | None = None

    def arguments(self, side: str) -> dict[str, Any]:
        """Pointers and strides."""
        stored = {"values": self.values, "metadata": self.metadata, "selection": self.selection}
        found: dict[str, Any] = {}
        for name, tensor in stored.items():
            if tensor is not None:
                found[f"{side}_{name}".upper()] = tensor
                found[f"{side}_{name}_expert"], found[f"{side}_{name}_row"] = tensor.stride()[:2]
        if self.selection is not None:
            found[f"{side}_first_block"] = self.first_block
        return found | _bias(side, self.bias)


Side = DenseSide | PackedSide


def _bias(side: str, bias: Tensor | None) -> dict[str, Any]:
    expert, row = (0, 0) if bias is None else bias.stride()
    return {f"{side.upper()}_BIAS": bias, f"{side}_bias_expert": expert, f"{side}_bias_row": row}
