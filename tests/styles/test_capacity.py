"""Dispatch into places: what becomes of one-hot dispatch and combination, and how a wrong rewrite of it is refused."""

import pytest
import torch

from samoyeds_compile.match.notation.operands import Operands
from samoyeds_compile.match.region import Operand
from tests.styles.capacity import GShardTop2, SwitchTop1
from tests.styles.harness import Seen, compare
from tests.styles.zoo import STYLES

ONE_HOT = ("gshard_top2", "deepspeed_chunks", "switch_top1")
"""Styles whose rows have places of their own, so that no table [T, E, C] is needed."""


def is_sparse(seen: Seen) -> bool:
    """Whether one block was rewritten, dispatch and combination included."""
    (block,) = seen.report.rewritten
    return not seen.after[0]["samoyeds::experts_batched"] and any(
        "expert_up" in op or "moe" in op for op in block.became
    )


@pytest.mark.parametrize("name", ONE_HOT)
def test_no_table_of_places(name: str) -> None:
    """The one-hot rows of positions, and with them all tables [T, E, C], are gone; those of ids remain."""
    style = STYLES[name]
    seen = compare(style.small(), style.input())
    choices = 2 if style.top_k == 2 else 1
    assert seen.before[0]["one_hot"] == 2 * choices
    assert seen.after[0]["one_hot"] == choices
    assert is_sparse(seen)


@pytest.mark.parametrize("name", ONE_HOT)
def test_forgotten_drops_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation fills experts with more rows than they have places."""

    def all_ids(operands: Operands) -> Operand:
        return operands.table

    monkeypatch.setattr(Operands, "ids", all_ids)
    style = STYLES[name]
    with torch.no_grad():
        seen = compare(style.small(), style.input(), train=False, base="eager")
    assert seen.report.rewritten == []
    assert any("more rows than places" in (block.reason or "") for block in seen.report.blocks)


@pytest.mark.parametrize(
    ("hidden", "width", "experts", "tokens"),
    [(16, 24, 4, 16), (16, 8, 4, 8), (8, 7, 4, 14), (4, 12, 4, 4), (6, 4, 2, 6), (24, 16, 8, 24), (16, 16, 16, 16)],
)
def test_equal_sizes(hidden: int, width: int, experts: int, tokens: int) -> None:
    """T = H, C = E, C = I and so on: validation finds out which number means what."""
    for block, x in (
        (GShardTop2(hidden, width, experts, 2), torch.randn(tokens, hidden)),
        (SwitchTop1(hidden, width, experts, 1), torch.randn(2, tokens, hidden)),
    ):
        torch._dynamo.reset()
        seen = compare(block, x)
        assert is_sparse(seen)


def test_positions_in_half_precision() -> None:
    """Counts above 256 are not exact in bfloat16: positions may be the same, so the dispatch has to stay."""
    block, x = SwitchTop1(16, 24, 2, 1).bfloat16(), torch.randn(1, 640, 16, dtype=torch.bfloat16)
    seen = compare(block, x, train=False, tolerance=(5e-2, 3e-2))
    assert not is_sparse(seen)
    assert seen.after[0]["samoyeds::experts_batched"] == 1
