"""Launches as data: the struct that a kernel takes, as bytes."""

import struct
from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.cuda.arguments import COMBINE, PROJECTION, TILES
from samoyeds_codegen.cuda.launch import Launch
from samoyeds_codegen.cuda.spec import TilesSpec

OFFSETS, TILE_LIST, COUNT = torch.zeros(3, dtype=torch.int32), torch.zeros(5, 4), torch.zeros(1)
LAUNCH = Launch(
    TilesSpec("sm_80", 8), (1, 1),
    {"tiles": TILE_LIST, "tile_count": COUNT, "offsets": OFFSETS, "experts": 3, "unused": 0},
)  # fmt: skip


def test_packed_in_the_order_of_the_struct() -> None:
    pointers = [t.data_ptr() for t in (OFFSETS, TILE_LIST, COUNT)]
    assert LAUNCH.packed == struct.pack("=QQQii", *pointers, 3, 0)


def test_none_is_a_null_pointer() -> None:
    empty = replace(LAUNCH, arguments={**LAUNCH.arguments, "tiles": None})
    assert struct.unpack("=QQQii", empty.packed)[1] == 0


@pytest.mark.parametrize("names", [{"experts": 3}, {**LAUNCH.arguments, "more": 1}])
def test_other_names(names) -> None:
    with pytest.raises(TypeError, match="missing or unknown"):
        _ = replace(LAUNCH, arguments=names).packed


@pytest.mark.parametrize("arguments", [PROJECTION, TILES, COMBINE], ids=["projection", "tiles", "combine"])
def test_no_padding(arguments) -> None:
    """C and Python lay the struct out alike: wide fields first, and the size is a multiple of 8."""
    codes = arguments.format[1:]
    assert struct.calcsize(f"<{codes}") == struct.calcsize(f"@{codes}") and struct.calcsize(f"<{codes}") % 8 == 0
    assert codes == "".join(sorted(codes, key="Qqi".index))
