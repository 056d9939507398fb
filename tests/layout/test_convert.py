"""`samoyeds::convert_layout` against its twin, and as its own inverse; its gradients are with those of other ops."""

import itertools

import pytest
import torch

from samoyeds_compile.errors import LayoutError, OperandError
from samoyeds_compile.layout.algebra import Layout, Place
from samoyeds_compile.ops import reference
from samoyeds_compile.ops.route import Plan, route

PLAN = route(torch.tensor([[2, 0], [0, 7], [2, 1], [-1, 2], [0, 2]]), 3)
"""Two slots belong to nobody."""
ALL = [
    Layout(rows, order, form, pad, dtype)
    for rows, order, form, pad, dtype in itertools.product(
        ("tokens", "slots"), ("token", "feature"), ("plain", "pairs"), (1, 4), (torch.float32, torch.bfloat16)
    )
    if not (rows == "tokens" and pad > 1) and not (form == "pairs" and order == "token")
]


def convert(x: torch.Tensor, source: Layout, target: Layout, plan: Plan = PLAN) -> torch.Tensor:
    return torch.ops.samoyeds.convert_layout(x, *plan, source.name, target.name)


@pytest.mark.parametrize("source", ALL, ids=lambda layout: layout.name)
def test_between_any_two(source: Layout) -> None:
    """From tokens into any layout, into any other, against the twin, and back to the tokens that it came from."""
    tokens = torch.randn(5, 6).bfloat16().float()  # no dtype here rounds it
    x = convert(tokens, Layout(), source)
    for target in ALL:
        made = convert(x, source, target)
        assert torch.equal(made, reference.convert_layout(x, PLAN, source.name, target.name)), target
        assert torch.equal(convert(made, target, Layout()), tokens), target


def test_names() -> None:
    assert [Layout.named(layout.name) for layout in ALL] == ALL
    assert Place.TILES.layout(torch.bfloat16, True).name == "slots/16 feature-major pairs bfloat16"
    assert Place.TILES.layout(torch.bfloat16, False) == Layout("slots", "feature", pad=16)
    assert [Place(i).layout(torch.float32, False).rows for i in range(2)] == ["tokens", "slots"]


@pytest.mark.parametrize("fields", [
    {"rows": "experts"}, {"order": "row"}, {"form": "packed"}, {"pad": 0}, {"pad": 4}, {"form": "pairs"},
    {"dtype": torch.int32},
])  # fmt: skip
def test_no_such_layout(fields: dict) -> None:
    with pytest.raises(LayoutError):
        Layout(**fields)


def test_refused() -> None:
    with pytest.raises(LayoutError, match="names no layout"):
        Layout.named("slots row-major float32")
    with pytest.raises(OperandError, match="its layout is"):
        convert(torch.zeros(5, 4), Layout(dtype=torch.bfloat16), Layout())
    with pytest.raises(OperandError, match="even number"):
        convert(torch.zeros(5, 3), Layout(), Layout("slots", "feature", "pairs"))
