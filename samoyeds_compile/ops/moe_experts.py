"""``samoyeds::moe_experts``: the canonical op. Every surface pattern becomes this; every lowering starts from it."""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.ops.library import bad_operand, define_composite


def moe_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Tensor | None,
    up_E: Tensor,
    down_E: Tensor,
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """``out[t] = sum over k of w[t, k] * down_e(act(up_e(x[t])))`` with ``e = expert_ids[t, k]``.

    An id outside ``0..E-1`` contributes nothing. No tokens, experts without tokens, one expert for all tokens, K = 1
    and an expert named twice by a token are all legal. Differentiable in x, the routing weights, weights and biases.

    Args:
        x_TH: tokens.
        expert_ids_TK: integers.
        expert_weights_TK: routing weights, floating.
        gate_E, up_E, gate_bias_E, up_bias_E, activation, gate_up_layout: as `expert_up` takes them.
        down_E, down_bias_E: as `expert_down` takes them.
        weight_layout: ``out_in`` ([E, out, in]) or ``in_out`` ([E, in, out]), of all weights.
        compute_dtype: dtype of the products.
        out_dtype: dtype of the result; None is what the rows and the routing weights promote to.

    Raises:
        OperandError: an operand does not fit the others.
    """
    _check(x_TH, expert_ids_TK, expert_weights_TK, up_E, activation, gate_up_layout)
    ops = torch.ops.samoyeds
    plan = ops.route(expert_ids_TK, up_E.shape[0])
    h_SI = ops.expert_up(x_TH, *plan, gate_E, up_E, gate_bias_E, up_bias_E, activation, gate_up_layout, weight_layout,
                         compute_dtype)  # fmt: skip
    return ops.expert_down(  # type: ignore[no-any-return]
        h_SI, *plan, down_E, down_bias_E, expert_weights_TK, weight_layout, compute_dtype, out_dtype
    )


def _check(x: Tensor, ids: Tensor, weights: Tensor, up_E: Tensor, activation: str, gate_up_layout: str) -> None:
    if x.dim() != 2:
        raise bad_operand("moe_experts", "x", f"has rank {x.dim()}", "pass tokens as [T, H]")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        shape = tuple(ids.shape)
        raise bad_operand("moe_experts", "expert_ids", f"has shape {shape}", f"pass [T, K] with T = {x.shape[0]}")
    if weights.shape != ids.shape:
        shape = tuple(weights.shape)
        raise bad_operand("moe_experts", "expert_weights", f"has shape {shape}", "give it the shape of expert_ids")
    if up_E.dim() != 3:
        raise bad_operand("moe_experts", "up", f"has rank {up_E.dim()}", "pass [E, out, in]")
    if not x.device == ids.device == weights.device == up_E.device:
        named = {"x": x, "expert_ids": ids, "expert_weights": weights, "up": up_E}
        where = ", ".join(f"{tensor.device} ({name})" for name, tensor in named.items())
        raise bad_operand("moe_experts", "operands", f"lie on {where}", "move them to one device")
    offered = {expr.PLAIN_NAME} if gate_up_layout == "none" else set(expr.GATED_NAMES)
    read = expr.names(activation)
    if not read <= offered:
        remedy = f"layout {gate_up_layout!r} offers {sorted(offered)}"
        raise bad_operand("moe_experts", "activation", f"reads {sorted(read)}", remedy)


OPERANDS = (
    "Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor? gate, Tensor up, Tensor down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str activation, str gate_up_layout, str weight_layout, "
    "ScalarType compute_dtype, ScalarType? out_dtype"
)
define_composite(f"moe_experts({OPERANDS}) -> Tensor", moe_experts)
