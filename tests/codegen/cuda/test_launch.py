"""Launches as data: the struct that a kernel takes, as bytes."""

import struct
from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.cuda.arguments import COMBINE, PROJECTION, ROUTE
from samoyeds_codegen.cuda.launch import Launch
from samoyeds_codegen.cuda.spec import RouteSpec

TENSORS = {name: torch.zeros(3) for name in ("ids", "order", "places", "offsets", "tiles", "tile_count")}
LAUNCH = Launch(RouteSpec("sm_80", 8, 16), (1, 1), {"unused": 0, "slots": 3, **TENSORS})


def test_packed_in_the_order_of_the_struct() -> None:
    assert LAUNCH.packed == struct.pack("=6Qii", *(t.data_ptr() for t in TENSORS.values()), 3, 0)


def test_none_is_a_null_pointer() -> None:
    empty = replace(LAUNCH, arguments={**LAUNCH.arguments, "tiles": None})
    assert struct.unpack("=6Qii", empty.packed)[4] == 0


@pytest.mark.parametrize("names", [{"slots": 3}, {**LAUNCH.arguments, "more": 1}])
def test_other_names(names) -> None:
    with pytest.raises(TypeError, match="missing or unknown"):
        _ = replace(LAUNCH, arguments=names).packed


@pytest.mark.parametrize("arguments", [PROJECTION, ROUTE, COMBINE], ids=["projection", "route", "combine"])
def test_no_padding(arguments) -> None:
    """C and Python lay the struct out alike: wide fields first, and the size is a multiple of 8."""
    codes = arguments.format[1:]
    assert struct.calcsize(f"<{codes}") == struct.calcsize(f"@{codes}") and struct.calcsize(f"<{codes}") % 8 == 0
    assert codes == "".join(sorted(codes, key=lambda code: code == "i"))
