"""Random experts of a shape, dense and packed, made on the device one expert at a time.

Dense weights are random everywhere: matrix units take less power for zeros and so run faster, which would flatter them.
Packed weights are random in canonical storage; nothing is pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Shape
from samoyeds_compile import PackedTensor, SparsityConfig
from samoyeds_compile.sparsity.pack import packed_shapes
from samoyeds_compile.sparsity.tensor import Form

DENSE = "dense"
PATTERNS: Mapping[str, SparsityConfig] = {
    "2:4": SparsityConfig(1, 1, 32),
    "75 %": SparsityConfig(1, 2, 128),
    "75 % /64": SparsityConfig(1, 2, 128, group=64),
}
"""Of packed weights; the last one lets tensor cores skip sub-rows, as 64 blocks share each choice."""
PAIRS = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
"""Metadata of a group of four: the first kept position in the low bits, the second in the high ones."""


@dataclass(frozen=True)
class Weights:
    """The experts of a block in one form.

    Attributes:
        name: ``dense``, or one of `PATTERNS`.
        up: gate and up rows, [E, 2 I, H].
        down: [E, H, I].
    """

    name: str
    up: Tensor
    down: Tensor

    @property
    def nbytes(self) -> int:
        """As stored."""
        return sum(w.packed_nbytes if isinstance(w, PackedTensor) else w.nbytes for w in (self.up, self.down))

    @property
    def density(self) -> float:
        """The share of values that is multiplied."""
        return float(PATTERNS[self.name].density) if self.name in PATTERNS else 1.0

    def of_expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Dense float64 matrices of one expert, [2 I, H] and [H, I]."""
        found = (w[expert : expert + 1] for w in (self.up, self.down))
        up, down = ((w.to_dense() if isinstance(w, PackedTensor) else w)[0].double() for w in found)
        return up, down


def make(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights, scaled so that results have the size of what goes in."""
    sizes = ((2 * shape.width, shape.hidden), (shape.hidden, shape.width))
    up, down = (_matrices(name, shape.experts, *size, dtype, device) for size in sizes)
    return Weights(name, up, down)


def _matrices(name: str, experts: int, rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if name == DENSE:
        whole = torch.empty(experts, rows, cols, dtype=dtype, device=device)
        for matrix in whole:
            matrix.normal_(std=cols**-0.5)
        return whole
    config = PATTERNS[name]
    sizes = packed_shapes(rows, cols, config)
    assert sizes["values"] is not None and sizes["metadata"] is not None
    values = torch.empty(experts, *sizes["values"], dtype=dtype, device=device)
    metadata = torch.empty(experts, *sizes["metadata"], dtype=torch.int16, device=device)
    for e in range(experts):
        values[e].normal_(std=(cols * float(config.density)) ** -0.5)
        metadata[e] = _metadata(sizes["metadata"], device)
    selection = None
    if sizes["selection"] is not None:
        selection = torch.randint(config.m, (experts, *sizes["selection"]), dtype=torch.uint8, device=device)
    return PackedTensor(values, metadata, selection, Form(config, rows, cols))


def _metadata(size: tuple[int, int], device: torch.device) -> Tensor:
    codes = torch.tensor(PAIRS, dtype=torch.int32, device=device)
    fours = codes[torch.randint(len(PAIRS), (*size, 4), device=device)]
    return (fours << torch.arange(0, 16, 4, dtype=torch.int32, device=device)).sum(-1).to(torch.int16)
