"""The one place from which integrations call the ``samoyeds::`` ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from samoyeds_compile.ops.operands import num_experts


def run_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    *,
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: str,
    gate: Sequence[Tensor] = (),
    gate_bias_E: Tensor | None = None,
    up_bias_E: Tensor | None = None,
    down_bias_E: Tensor | None = None,
    gate_up_layout: str = "none",
    weight_layout: str = "out_in",
    dropout: float = 0.0,
) -> Tensor:
    """All experts over all tokens, as ``samoyeds::moe_experts`` wherever that can say it.

    Products run in the dtype in which ``F.linear`` would run them: autocast's, or else the weights'.

    Args:
        x_TH: tokens.
        expert_ids_TK: integers; ids outside ``0..E-1`` contribute nothing.
        expert_weights_TK: routing weights.
        up, down, gate: one stack [E, rows, cols], or E matrices.
        activation, gate_bias_E, up_bias_E, down_bias_E, gate_up_layout, weight_layout: as the op takes them.
        dropout: probability with which activated features are dropped; it needs the two projections apart.

    Returns:
        [T, H], in the dtype of ``x_TH``.
    """
    up_dtype, down_dtype = (_product_dtype(x_TH, weights[0]) for weights in (up, down))
    gates, ups, downs = (list(weights) for weights in (gate, up, down))
    gate_bias_E, up_bias_E = (_cast(bias, up_dtype) for bias in (gate_bias_E, up_bias_E))
    down_bias_E = _cast(down_bias_E, down_dtype)
    ops = torch.ops.samoyeds
    if not dropout and up_dtype == down_dtype:
        return ops.moe_experts.default(  # type: ignore[no-any-return]
            x_TH, expert_ids_TK, expert_weights_TK, gates, ups, downs, gate_bias_E, up_bias_E, down_bias_E,
            activation, gate_up_layout, weight_layout, "output", up_dtype, x_TH.dtype,
        )  # fmt: skip
    plan = ops.route.default(expert_ids_TK, num_experts(ups))
    h_SI = ops.expert_up.default(
        x_TH, *plan, gates, ups, gate_bias_E, up_bias_E, None, activation, gate_up_layout, weight_layout, up_dtype
    )
    h_SI = F.dropout(h_SI, dropout)
    return ops.expert_down.default(  # type: ignore[no-any-return]
        h_SI, *plan, downs, down_bias_E, expert_weights_TK, weight_layout, down_dtype, x_TH.dtype
    )


def _product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)
