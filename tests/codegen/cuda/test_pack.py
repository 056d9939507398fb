"""Records: the same bits as canonical storage, where the layout says they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_codegen.cuda import layout
from samoyeds_codegen.cuda.pack import Condensed, pack, pack_bias, unpack
from samoyeds_codegen.cuda.pattern import Pattern
from tests.codegen.cuda.weights import PATTERNS, condensed, random_weight


def same(a: Condensed, b: Condensed) -> bool:
    pairs = [(a.values, b.values), (a.metadata, b.metadata), (a.selection, b.selection)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x is y for x, y in pairs)


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    experts=st.integers(0, 2),
    rows=st.integers(1, 150),
    columns=st.integers(1, 300),
    gated=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_unpack_is_the_inverse(pattern, experts, rows, columns, gated, dtype) -> None:
    matrices = [condensed(random_weight(pattern, experts, rows, columns, dtype, seed)[1]) for seed in range(1 + gated)]
    records = pack(pattern, matrices[-1], matrices[0] if gated else None)
    assert records.shape[-1] == layout.record_bytes(pattern.selects) and records.dtype == torch.uint8
    found = unpack(pattern, records, dtype, matrices[0].values.shape[1], 2 * matrices[0].values.shape[2], gated)
    assert len(found) == len(matrices) and all(map(same, found, matrices))


def test_meta_device() -> None:
    """Shapes alone, as loading without weights needs."""
    pattern = Pattern(1, 2, 32)
    weight = condensed(random_weight(pattern, 2, 256, 256)[1])
    empty = Condensed(*(t.to("meta") for t in (weight.values, weight.metadata, weight.selection)))
    assert pack(pattern, empty).shape == pack(pattern, weight).shape == (2, 2, 2, 9280)


@pytest.mark.parametrize("gated", [False, True])
def test_values_are_where_the_layout_says(gated) -> None:
    """Row 37 of a tile, in a gated one the up row of slab 2."""
    pattern, rows = Pattern(1, 2, 128), 512
    up, gate = (condensed(random_weight(pattern, 2, rows, 384, seed=s)[1]) for s in range(2))
    records = pack(pattern, up, gate if gated else None)
    tile, row, block, step, half = 1, 47, 2, 3, 1
    condensed_row = 64 + row if not gated else (tile * 4 + row // 16) * 8 + row % 8
    at = layout.VALUE(row, half, step)
    found = records[1, tile, block, at : at + 16].view(torch.bfloat16)
    first = block * 64 + step * 16 + half * 8
    assert torch.equal(found, up.values[1, condensed_row, first : first + 8])


def test_metadata_is_where_the_layout_says() -> None:
    """Lane 4 g + q of a slab: rows g and g + 8; q says which 16 columns of which of two steps."""
    pattern = Pattern(1, 1, 32)
    weight = condensed(random_weight(pattern, 1, 128, 256)[1])
    records = pack(pattern, weight)
    for slab, g, q, pair in [(0, 0, 0, 0), (1, 3, 1, 1), (2, 7, 2, 0), (3, 5, 3, 1)]:
        at = layout.METADATA(slab, 4 * g + q) + 4 * pair
        low, high = records[0, 1, 1, at : at + 4].view(torch.int16)
        column = 8 + pair * 4 + q
        row = 64 + slab * 16 + g
        assert [low, high] == [weight.metadata[0, row, column], weight.metadata[0, row + 8, column]]


def test_bytes() -> None:
    """At 1:2, 9,280 bytes for 128 dense rows of 128 columns: 0.283 of bfloat16."""
    assert layout.record_bytes(True) / (128 * 128 * 2) < 0.284
    assert layout.record_bytes(False) / (64 * 128 * 2) == 0.5625


def test_offsets_print_what_they_compute() -> None:
    """As CUDA they are arithmetic of whole numbers; Python's agrees for numbers that are not negative."""
    for offset, values in [(layout.VALUE, (37, 1, 3)), (layout.METADATA, (3, 29))]:
        body = offset.to_cuda().split("return ")[1].split(";")[0].replace("/", "//")
        names = {str(a): v for a, v in zip(offset.arguments, values, strict=True)}
        assert eval(body, {}, names) == offset(*values)


@pytest.mark.parametrize("pattern", [Pattern(1, 1, 32), Pattern(1, 2, 32)], ids=str)
def test_bias_follows_the_rows(pattern) -> None:
    up, gate = torch.arange(2 * 200).reshape(2, 200).float(), -torch.arange(2 * 200).reshape(2, 200).float()
    width = pattern.dense_rows
    packed = pack_bias(pattern, up, gate).unflatten(1, (-1, width))
    assert packed.shape[1] % 128 == 0
    slab, row = 3, 5
    assert torch.equal(packed[1, slab * 16 + row], gate[1, (slab * 8 + row) * width :][:width])
    assert torch.equal(packed[1, slab * 16 + 8 + row], up[1, (slab * 8 + row) * width :][:width])
    assert torch.equal(pack_bias(pattern, up)[:, :200], up)
