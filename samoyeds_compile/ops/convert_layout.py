"""``samoyeds::convert_layout``: any layout into any other, as one op; its twin is in `reference`.

Kernels convert on the way (they gather straight into tiles); this op is what their conversions mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_compile.layout.algebra import Layout
from samoyeds_compile.ops.library import bad_operand, define_composite
from samoyeds_compile.ops.rows import dispatch


def convert_layout(
    x: Tensor, order_S: Tensor, slot_TK: Tensor, expert_S: Tensor, offsets_E: Tensor, source: str, target: str
) -> Tensor:
    """The same rows in another layout.

    From tokens to slots each row is copied to its token's slots; back, a token gets its first slot's row, which is what
    it was if slots hold copies. From padded slots to ragged ones the rows in between are dropped.

    Args:
        x: as ``source`` says: [rows, features], [features, rows] or [features / 2, rows, 2].
        order_S, slot_TK, expert_S, offsets_E: the plan that `route` made.
        source, target: names of layouts (`Layout.name`).

    Returns:
        As ``target`` says. Padded slots have S + E * (pad - 1) rows, the most there can be, as no device is asked.

    Raises:
        LayoutError: a name is no layout's.
        OperandError: x does not have the shape or dtype of its layout, or an odd number of features is to be paired.
    """
    before, after = Layout.named(source), Layout.named(target)
    _check(x, before)
    rows = _to_rows(x, before)
    plan = (order_S, slot_TK, expert_S, offsets_E)
    if before.pad > 1:
        rows = rows[_padded(expert_S, offsets_E, before.pad)]
    if (before.rows, after.rows) == ("tokens", "slots"):
        rows = dispatch(rows, order_S, slot_TK, offsets_E)
    elif (before.rows, after.rows) == ("slots", "tokens"):
        rows = rows[slot_TK[:, 0]]
    if after.pad > 1:
        rows = _spread(rows, plan, after.pad)
    return _from_rows(rows, after)


def _check(x: Tensor, layout: Layout) -> None:
    rank = 3 if layout.form == "pairs" else 2
    if x.dim() != rank or x.dtype != layout.dtype:
        raise bad_operand("convert_layout", "x", f"has rank {x.dim()}, {x.dtype}", f"its layout is {layout.name}")


def _to_rows(x: Tensor, layout: Layout) -> Tensor:
    """[rows, features]."""
    if layout.form == "pairs":
        return x.transpose(0, 1).reshape(x.shape[1], -1)
    return x.transpose(0, 1) if layout.order == "feature" else x


def _from_rows(rows: Tensor, layout: Layout) -> Tensor:
    rows = rows.to(layout.dtype)
    if layout.form == "pairs":
        if rows.shape[1] % 2:
            raise bad_operand("convert_layout", "x", f"has {rows.shape[1]} features", "pad them to an even number")
        return rows.reshape(rows.shape[0], -1, 2).transpose(0, 1).contiguous()
    return rows.transpose(0, 1).contiguous() if layout.order == "feature" else rows.contiguous()


def _padded(expert_S: Tensor, offsets_E: Tensor, pad: int) -> Tensor:
    """[S]: where each slot is if every expert begins at a multiple of ``pad``; slots of nobody come last."""
    counts = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    padded = (counts + pad - 1) // pad * pad
    shift = torch.cat([offsets_E.new_zeros(1), torch.cumsum(padded - counts, 0)])
    positions = torch.arange(expert_S.shape[0], device=expert_S.device)
    return positions + shift[expert_S.clamp(max=counts.shape[0])]


def _spread(rows: Tensor, plan: tuple[Tensor, Tensor, Tensor, Tensor], pad: int) -> Tensor:
    _order, _slot, expert_S, offsets_E = plan
    places = _padded(expert_S, offsets_E, pad)
    out = rows.new_zeros(rows.shape[0] + offsets_E.shape[0] * (pad - 1), rows.shape[1])
    return out.index_copy(0, places, rows)


define_composite(
    "convert_layout(Tensor x, Tensor order, Tensor slot, Tensor expert, Tensor offsets, str source, str target) -> "
    "Tensor",
    convert_layout,
)
