"""Packed weights as kernels take them: the tensors of canonical storage, and how far apart experts are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_codegen.cuda.layout import STEP_COLUMNS
from samoyeds_codegen.cuda.pattern import require


@dataclass(frozen=True)
class Matrix:
    """A matrix of each of E experts in canonical storage (see ``PackedWeight``); rows of an expert without gaps.

    Attributes:
        values: [E, R, C/2], 16-bit floats; R condensed rows, C columns, a multiple of 32.
        metadata: int16 [E, R, C/16].
        selection: uint8 [E, all rows / group, C/vector]; None where all sub-rows are kept.
        first_block: the block of ``selection`` at which ``values`` begin.
        bias: [E, features], floating, by any strides; None if there is none.
    """

    values: Tensor
    metadata: Tensor
    selection: Tensor | None
    first_block: int = 0
    bias: Tensor | None = None

    def arguments(self, prefix: str, dtype: torch.dtype) -> dict[str, Tensor | int | None]:
        """Pointers and strides, by the names of the kernel's arguments."""
        bias = None if self.bias is None else self.bias.to(dtype).contiguous()
        tensors = {
            "values": _placed(self.values, 16), "metadata": _placed(self.metadata, 4), "selection": self.selection,
            "bias": bias,
        }  # fmt: skip
        strides = {f"{prefix}{n}_expert": 0 if t is None else t.stride(0) for n, t in tensors.items()}
        return {**{f"{prefix}{name}": tensor for name, tensor in tensors.items()}, **strides}


NOTHING: dict[str, Tensor | int | None] = {
    f"up_{name}{ending}": nothing
    for name in ("values", "metadata", "selection", "bias")
    for ending, nothing in (("", None), ("_expert", 0))
}
"""Arguments for the second matrix where there is no gate."""


@dataclass(frozen=True)
class Projection:
    """One projection of all experts.

    Attributes:
        features: dense rows of a matrix.
        columns: dense columns.
        matrix: the only one, or the gate.
        up: what the gate is for, with storage of the same shape; None without one.

    Raises:
        UnsupportedSpecError: kernels cannot read it where it lies.
    """

    features: int
    columns: int
    matrix: Matrix
    up: Matrix | None = None

    def __post_init__(self) -> None:
        matrices = [self.matrix] if self.up is None else [self.matrix, self.up]
        require(self.width % STEP_COLUMNS == 0, f"rows of {self.width} columns are no multiple of {STEP_COLUMNS}")
        for name in ("values", "metadata", "selection"):
            tensors = [t for m in matrices if (t := getattr(m, name)) is not None]
            whole = all(t.stride()[1:] == (t.shape[2], 1) for t in tensors)
            require(whole, f"rows of {name} do not follow one another")
        require(self.rows * self.width < 2**32, "an expert has 2**31 values or more")
        require(len({m.values.shape for m in matrices}) == 1, "gate and up have different shapes")

    @property
    def rows(self) -> int:
        """Condensed rows of a matrix."""
        return self.matrix.values.shape[1]

    @property
    def width(self) -> int:
        """Columns that are stored."""
        return 2 * self.matrix.values.shape[2]

    @property
    def has_bias(self) -> bool:
        """Whether any matrix has one."""
        return any(m is not None and m.bias is not None for m in (self.matrix, self.up))

    def arguments(self, dtype: torch.dtype) -> dict[str, Tensor | int | None]:
        """Pointers, strides and the like of all matrices; biases become ``dtype``."""
        second = NOTHING if self.up is None else self.up.arguments("up_", dtype)
        first_block = 0 if self.up is None else self.up.first_block
        return {**self.matrix.arguments("", dtype), **second, "up_first_block": first_block}


def _placed(tensor: Tensor, bytes_: int) -> Tensor:
    """The tensor where addresses are multiples of so many bytes: itself, but for views that start anywhere."""
    return tensor if tensor.data_ptr() % bytes_ == 0 else tensor.clone(memory_format=torch.contiguous_format)
