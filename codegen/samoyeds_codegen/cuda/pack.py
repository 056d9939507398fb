"""Canonical packed storage to records and back (see `layout`): the same bits in another order.

Rows of a slab of 16 follow one another; with gates, rows 0 to 7 of a slab are gates and rows 8 to 15 the ups of the
same features, so that one thread holds both. Rows are padded to whole thread blocks and columns to whole records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_codegen.cuda.layout import COLUMNS, ROWS, SELECTION_AT, VALUE_BYTES
from samoyeds_codegen.cuda.pattern import Pattern

BLOCK_ROWS = 128
"""Condensed rows are padded to a multiple of the most that a thread block has."""
NO_POSITIONS = 0x4444
"""Metadata of padding: columns 0 and 1 of every 4, as positions must ascend."""


@dataclass(frozen=True)
class Condensed:
    """A projection of E experts in canonical storage (see ``PackedWeight``).

    Attributes:
        values: [E, R, C/2], 16-bit floats; R condensed rows, C columns.
        metadata: int16 [E, R, C/16].
        selection: uint8 [E, R/group, C/vector]; None where all sub-rows are kept.
    """

    values: Tensor
    metadata: Tensor
    selection: Tensor | None


def pack(pattern: Pattern, weight: Condensed, gate: Condensed | None = None) -> Tensor:
    """Records of a projection.

    Args:
        pattern: of the weights.
        weight: the projection; with a gate, the up projection.
        gate: of the same shape.

    Returns:
        uint8 [E, R'/64, C'/128, record]: R' and C' are the padded sizes, R' of both projections together.
    """
    both = [weight] if gate is None else [gate, weight]
    parts = [
        _values_in(_joined([m.values for m in both], 2, 0)),
        _metadata_in(_joined([m.metadata for m in both], 16, NO_POSITIONS)),
    ]
    if pattern.selects:
        codes = [_codes(pattern, m.selection) for m in both if m.selection is not None]
        parts.append(_codes_in(pattern, _joined(codes, pattern.vector, 0)))
    return torch.cat(parts, dim=-1)


def unpack(
    pattern: Pattern, records: Tensor, dtype: torch.dtype, rows: int, columns: int, gated: bool
) -> list[Condensed]:
    """Inverse of `pack`.

    Args:
        pattern: of the weights.
        records: as `pack` gives them.
        dtype: of the values.
        rows, columns: R and C of each matrix.
        gated: whether there are a gate and an up projection.

    Returns:
        The projection, or gate and up.
    """

    def taken(out: Callable[[Tensor], Tensor], first: int, last: int, kind: torch.dtype, width: int) -> list[Tensor]:
        part = out(records[..., first:last].contiguous().view(kind))
        return [half[:, :rows, : columns // width].contiguous() for half in _split(part, gated)]

    values = taken(_values_out, 0, VALUE_BYTES, dtype, 2)
    metadata = taken(_metadata_out, VALUE_BYTES, SELECTION_AT, torch.int16, 16)
    if not pattern.selects:
        return [Condensed(v, m, None) for v, m in zip(values, metadata, strict=True)]
    end = SELECTION_AT + ROWS
    codes = taken(lambda c: _codes_out(pattern, c), SELECTION_AT, end, torch.uint8, pattern.vector)
    selections = (_selection(pattern, c) for c in codes)
    return [Condensed(*parts) for parts in zip(values, metadata, selections, strict=True)]


def pack_bias(pattern: Pattern, bias: Tensor, gate: Tensor | None = None) -> Tensor:
    """Biases [E, features] in the order of packed rows, [E, R' * dense rows of each], zero for padding."""
    width = pattern.dense_rows
    rows = [_filled(b, 1, width, 0).unflatten(1, (-1, width)) for b in ([bias] if gate is None else [gate, bias])]
    return _slabs(rows, 0).flatten(1).contiguous()


def _filled(matrix: Tensor, axis: int, multiple: int, fill: int) -> Tensor:
    """The matrix with an axis padded to a multiple."""
    shape = [*matrix.shape]
    shape[axis] = -shape[axis] % multiple
    return torch.cat([matrix, matrix.new_full(shape, fill)], dim=axis) if shape[axis] else matrix


def _joined(matrices: list[Tensor], width: int, fill: int) -> Tensor:
    """Padded gates and ups [E, R, C/width] in one matrix, [E, R', C'/width]."""
    return _slabs([_filled(m, 2, COLUMNS // width, fill) for m in matrices], fill)


def _slabs(matrices: list[Tensor], fill: int) -> Tensor:
    filled = [_filled(m, 1, BLOCK_ROWS // len(matrices), fill) for m in matrices]
    eights = [m.unflatten(1, (m.shape[1] // 8, 8)) for m in filled]
    return torch.stack(eights, dim=2).flatten(1, 3)


def _split(joined: Tensor, gated: bool) -> list[Tensor]:
    """Inverse of `_joined`, with padding."""
    halves = 2 if gated else 1
    eights: Tensor = joined.unflatten(1, (joined.shape[1] // 8 // halves, halves, 8))
    return [eights[:, :, i].flatten(1, 2) for i in range(halves)]


# Axes below: e expert, t row tile, b column block, s step, g group of 8 rows, h half of a step or of a slab.


def _values_in(values: Tensor) -> Tensor:
    tiles: Tensor = values.unflatten(2, (values.shape[2] // 64, 4, 2, 8))
    tiles = tiles.unflatten(1, (tiles.shape[1] // ROWS, 8, 8))  # e t g row b s h value
    return tiles.permute(0, 1, 4, 5, 2, 6, 3, 7).flatten(3).contiguous().view(torch.uint8)


def _values_out(records: Tensor) -> Tensor:
    tiles: Tensor = records.unflatten(3, (4, 8, 2, 8, 8))  # e t b s g h row value
    return tiles.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(1, 3)


def _metadata_in(metadata: Tensor) -> Tensor:
    tiles: Tensor = metadata.unflatten(2, (metadata.shape[2] // 8, 2, 2, 2))
    tiles = tiles.unflatten(1, (tiles.shape[1] // ROWS, 4, 2, 8))  # e t slab h row b pair selector quarter
    return tiles.permute(0, 1, 5, 2, 4, 7, 8, 6, 3).flatten(3).contiguous().view(torch.uint8)


def _metadata_out(records: Tensor) -> Tensor:
    tiles: Tensor = records.unflatten(3, (4, 8, 2, 2, 2, 2))  # e t b slab row selector quarter pair h
    return tiles.permute(0, 1, 3, 8, 4, 2, 7, 5, 6).flatten(5).flatten(1, 4)


def _codes(pattern: Pattern, selection: Tensor) -> Tensor:
    """Selection as a code for every condensed row, [E, R, C/vector]: the i-th kept sub-row of a block is i or later."""
    kept: Tensor = selection.unflatten(1, (selection.shape[1] // pattern.n, pattern.n))  # e group i vector
    codes = kept - torch.arange(pattern.n, dtype=torch.uint8, device=kept.device)[:, None]
    shape = (*codes.shape[:2], pattern.group, *codes.shape[2:])
    return codes.unsqueeze(2).expand(shape).flatten(1, 3)


def _selection(pattern: Pattern, codes: Tensor) -> Tensor:
    """Inverse of `_codes`."""
    blocks = codes.shape[1] // pattern.n // pattern.group
    kept: Tensor = codes.unflatten(1, (blocks, pattern.group, pattern.n))[:, :, 0]
    return (kept + torch.arange(pattern.n, dtype=torch.uint8, device=codes.device)[:, None]).flatten(1, 2)


def _shifts(pattern: Pattern, like: Tensor) -> Tensor:
    """Where the codes of a record's vectors are in a byte."""
    return torch.arange(COLUMNS // pattern.vector, dtype=torch.uint8, device=like.device) * pattern.choice_bits


def _codes_in(pattern: Pattern, codes: Tensor) -> Tensor:
    together = COLUMNS // pattern.vector
    vectors: Tensor = codes.unflatten(2, (codes.shape[2] // together, together))
    rows: Tensor = (vectors << _shifts(pattern, codes)).sum(-1, dtype=torch.uint8)
    tiles: Tensor = rows.unflatten(1, (rows.shape[1] // ROWS, ROWS))
    return tiles.mT.contiguous()


def _codes_out(pattern: Pattern, records: Tensor) -> Tensor:
    rows: Tensor = records.mT.flatten(1, 2).unsqueeze(-1)
    return (rows >> _shifts(pattern, records) & (1 << pattern.choice_bits) - 1).flatten(2)
