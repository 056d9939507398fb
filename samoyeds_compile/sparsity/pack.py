"""Dense weight to canonical storage and back (what checkpoints hold; no kernel's own order)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.blocks import cut, joined, padded, padded_shape
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.solver import PADDING, best_inner, best_mask, best_sub_rows, require_matrix

NIBBLES = 4
"""Groups of 4 columns whose positions one int16 of metadata holds."""


@dataclass(frozen=True)
class PackedWeight:
    """A sparse weight [..., rows, cols] in canonical storage; R = padded rows * n / m condensed rows, C padded columns.

    Condensed row r of block b holds the r-th kept sub-row of that block, which may be another one in every vector.

    Attributes:
        values: [..., R, C/2] with ``inner="2:4"``, else [..., R, C]; the weight's dtype.
        metadata: int16 [..., R, C/16]: 4 bits for each group of 4 columns, the first group in the lowest bits; the low
            two bits are the first kept column, the high two bits the second. None with ``inner="none"``.
        selection: uint8 [..., R/group, C/vector]: which of the m sub-rows. None where all are kept, n = m.
        shape: (rows, cols) of the dense matrix.
        config: the pattern.
    """

    values: Tensor
    metadata: Tensor | None
    selection: Tensor | None
    shape: tuple[int, int]
    config: SparsityConfig

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return sum(t.nbytes for t in (self.values, self.metadata, self.selection) if t is not None)


def validate(weight: Tensor, config: SparsityConfig, name: str = "weight") -> None:
    """Check that a weight has a pattern.

    Args:
        weight: [..., rows, cols], floating.
        config: the pattern.
        name: what to call it in the error.

    Raises:
        SparsityError: it does not; the message names the first value that is too many.
    """
    require_matrix(weight, name)
    occupied = weight != 0
    extra = occupied & ~best_mask(occupied.to(torch.float32), config)
    if bool(extra.any()):
        at = tuple(int(i) for i in extra.nonzero()[0])
        raise SparsityError(
            f"{name}: the value at {list(at)} is one too many for the pattern {config}; prune the weight to the "
            "pattern first (best_mask), or pack it with another"
        )


def pack(weight: Tensor, config: SparsityConfig, name: str = "weight") -> PackedWeight:
    """Pack a weight that has the pattern.

    Args:
        weight: [..., rows, cols], floating; rows are output features, so transposed storage is passed as a view.
        config: the pattern.
        name: what to call it in an error.

    Raises:
        SparsityError: the weight does not have the pattern.
    """
    validate(weight, config, name)
    blocks = cut(padded(weight, config), config)
    scores = cut(padded((weight != 0).to(torch.float32), config, fill=PADDING), config)
    inner = best_inner(scores, config)
    kept = best_sub_rows((scores * inner).clamp(min=0), config)
    selection = _positions(kept.movedim(-2, -1), config.n).movedim(-1, -2)  # [..., groups, n, vectors]
    condensed = joined(_select(blocks, selection))
    values, metadata = condensed, None
    if config.inner == "2:4":
        fours = joined(_select(inner, selection)).unflatten(-1, (-1, 4))
        positions = _positions(fours, 2)
        values = condensed.unflatten(-1, (-1, 4)).gather(-1, positions).flatten(-2)
        metadata = _encode(positions)
    stored = selection.to(torch.uint8).flatten(-3, -2).contiguous() if config.n < config.m else None
    return PackedWeight(values.contiguous(), metadata, stored, _shape(weight), config)


def unpack(packed: PackedWeight) -> Tensor:
    """The dense weight [..., rows, cols]."""
    config, (rows, cols) = packed.config, packed.shape
    condensed = packed.values
    if packed.metadata is not None:
        pairs = packed.values.unflatten(-1, (-1, 2))
        fours = pairs.new_zeros(*pairs.shape[:-1], 4)
        condensed = fours.scatter(-1, _decode(packed.metadata), pairs).flatten(-2)
    whole_rows, whole_cols = padded_shape(rows, cols, config)
    blocks = cut(condensed.new_zeros(*condensed.shape[:-2], whole_rows, whole_cols), config)
    kept = condensed.reshape(*blocks.shape[:-3], config.n, *blocks.shape[-2:])
    if packed.selection is not None:
        selection = packed.selection.to(torch.int64).unflatten(-2, (-1, config.n))
        kept = blocks.scatter(-3, _spread(selection, kept.shape), kept)
    return joined(kept)[..., :rows, :cols].contiguous()


def packed_shapes(rows: int, cols: int, config: SparsityConfig) -> dict[str, tuple[int, int] | None]:
    """The last two sizes of ``values``, ``metadata`` and ``selection`` of a matrix; None for what is not stored."""
    whole_rows, whole_cols = padded_shape(rows, cols, config)
    condensed, two_of_four = whole_rows * config.n // config.m, config.inner == "2:4"
    return {
        "values": (condensed, whole_cols // 2 if two_of_four else whole_cols),
        "metadata": (condensed, whole_cols // 16) if two_of_four else None,
        "selection": (condensed // config.group, whole_cols // config.vector) if config.n < config.m else None,
    }


def _shape(weight: Tensor) -> tuple[int, int]:
    return int(weight.shape[-2]), int(weight.shape[-1])


def _positions(kept: Tensor, count: int) -> Tensor:
    """Where the ``count`` true entries along the last axis are, in ascending order."""
    return kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :count]


def _spread(selection: Tensor, shape: torch.Size) -> Tensor:
    """Selection [..., groups, n, vectors] for every block of a group and every column of a vector."""
    return selection[..., :, None, :, :, None].expand(shape)


def _select(blocks: Tensor, selection: Tensor) -> Tensor:
    """The kept sub-rows, [..., groups, group, n, vectors, vector]."""
    shape = torch.Size((*blocks.shape[:-3], selection.shape[-2], *blocks.shape[-2:]))
    return blocks.gather(-3, _spread(selection, shape))


def _encode(positions: Tensor) -> Tensor:
    """Positions [..., C/4, 2] as int16 [..., C/16]."""
    nibbles = (positions[..., 0] | (positions[..., 1] << 2)).unflatten(-1, (-1, NIBBLES))
    shifts = torch.arange(0, 4 * NIBBLES, 4, device=positions.device)
    word = (nibbles << shifts).sum(dim=-1)
    return torch.where(word < 2**15, word, word - 2**16).to(torch.int16)


def _decode(metadata: Tensor) -> Tensor:
    """Int16 [..., C/16] as positions [..., C/4, 2]."""
    shifts = torch.arange(0, 4 * NIBBLES, 4, device=metadata.device)
    nibbles = ((metadata.to(torch.int64).unsqueeze(-1) >> shifts) & 15).flatten(-2)
    return torch.stack([nibbles & 3, nibbles >> 2], dim=-1)
