"""``samoyeds::experts_gathered``: the canonical op computed with one copy of the weights per slot, for few slots.

Inductor fuses the gather into the products, so no copy is made; with few slots that beats one call an expert. The
lowering chooses it where it also replaces that form (see `samoyeds_compile.lower.choose`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.ops.expert_up import split_gate
from samoyeds_compile.ops.library import bad_operand, define_composite
from samoyeds_compile.ops.moe_experts import OPERANDS, check_canonical
from samoyeds_compile.ops.operands import is_stack, num_experts


def experts_gathered(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The same function of the same operands as `moe_experts`; the weights must be stacks, as no matrix is gathered.

    Raises:
        OperandError: an operand does not fit the others, or weights are separate matrices.
    """
    check_canonical(
        "experts_gathered", x_TH, expert_ids_TK, expert_weights_TK, gate_E, up_E, down_E, activation, gate_up_layout,
        weight_layout, weighting,
    )  # fmt: skip
    _check_stacks(gate=gate_E, up=up_E, down=down_E)
    tokens, top_k = expert_ids_TK.shape
    is_expert_TK = (expert_ids_TK >= 0) & (expert_ids_TK < num_experts(up_E))
    ids_S = torch.where(is_expert_TK, expert_ids_TK, 0).reshape(-1)
    weights_TK = torch.where(is_expert_TK, expert_weights_TK, 0)  # a sentinel's weight must not meet any expert
    in_out = weight_layout == "in_out"
    if weighting == "input":
        weighted_TKH = x_TH.unsqueeze(1) * weights_TK.unsqueeze(-1)
        x_SH = torch.where(is_expert_TK.unsqueeze(-1), weighted_TKH, 0).to(compute_dtype).flatten(0, 1)
    else:
        x_SH = x_TH.to(compute_dtype).repeat_interleave(top_k, dim=0)
    z = _linear(x_SH, up_E[0], up_bias_E, ids_S, in_out)
    inputs = split_gate(z, gate_up_layout)
    if gate_E:
        inputs = {"gate": _linear(x_SH, gate_E[0], gate_bias_E, ids_S, in_out), "up": z}
    h_SI = expr.evaluate(activation, inputs).to(compute_dtype)
    y_SH = _linear(h_SI, down_E[0], down_bias_E, ids_S, in_out)
    y_TKH = y_SH.view(tokens, top_k, y_SH.shape[1])
    if weighting == "output":
        y_TKH = y_TKH * weights_TK.unsqueeze(-1)
    out_TH = torch.where(is_expert_TK.unsqueeze(-1), y_TKH, 0).sum(1)
    return out_TH if out_dtype is None else out_TH.to(out_dtype)


def _linear(x_S: Tensor, weight_E: Tensor, bias_E: Tensor | None, ids_S: Tensor, in_out: bool) -> Tensor:
    weight_S = weight_E[ids_S].to(x_S.dtype)
    if in_out:
        y_S = torch.bmm(x_S.unsqueeze(1), weight_S).squeeze(1)
    else:
        y_S = torch.bmm(weight_S, x_S.unsqueeze(-1)).squeeze(-1)
    return y_S if bias_E is None else (y_S + bias_E[ids_S]).to(y_S.dtype)


def _check_stacks(**named: Sequence[Tensor]) -> None:
    for name, weights in named.items():
        if weights and not is_stack(weights):
            raise bad_operand("experts_gathered", name, "holds separate matrices", "pass [E, out, in]")


define_composite(f"experts_gathered({OPERANDS}) -> Tensor", experts_gathered)
