"""``samoyeds::token_linear`` and ``samoyeds::token_outer``: `expert_linear` and `expert_outer` on rows of tokens.

They take the tokens [T, H] and the plan, and gather inside: what is saved for the backward are the tokens, which the
rest of the model holds anyway, and not K rows for each of them. On a CPU the rows of one expert are gathered at a time,
so that they stay in the cache between the gather and the product. Gathering again costs far less than the product, so
there is nothing for the partitioner to weigh up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.ops import cpu_products, rows
from samoyeds_compile.ops.expert_linear import expert_linear, expert_outer, linear_by_expert, outer_by_expert
from samoyeds_compile.ops.library import bad_operand, define_opaque, register_autograd
from samoyeds_compile.ops.operands import check_weights, in_width, is_stack, num_experts, out_width, weight_grads
from samoyeds_compile.ops.token_rows import TokenRows

_AT_ONCE = 8 * 2**20
"""Bytes of rows up to which all are gathered at once, as a gather for each expert takes time of its own."""


def token_linear(
    x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool
) -> Tensor:
    """`expert_linear` of each slot's token.

    Args:
        x_TH: tokens.
        order_S, slot_TK, offsets_E: of the plan that `route` made.
        weights, in_out: as `expert_linear` takes them.

    Returns:
        [S, O] in the dtype of x; rows after the last run belong to no expert and are undefined.

    Raises:
        OperandError: shapes or devices do not fit.
    """
    _check(x_TH, weights, offsets_E, in_out)
    found = _rows(x_TH, order_S, slot_TK)
    if (generated := cpu_products.linear(found, weights, offsets_E, in_out)) is not None:
        return generated
    if _all_at_once(found):
        return expert_linear(found.gathered(), weights, offsets_E, in_out)
    matrices = weights[0] if is_stack(weights) else weights
    return linear_by_expert(found, matrices, offsets_E.tolist(), in_out)


def token_outer(
    x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, grad_SO: Tensor, offsets_E: Tensor, in_out: bool
) -> Tensor:
    """`expert_outer` of each slot's token and its row of ``grad``: the derivative of `token_linear` by its weight.

    Returns:
        [E, O, H], or [E, H, O] if ``in_out``; zero for an expert without rows.
    """
    found = _rows(x_TH, order_S, slot_TK)
    left, right = (found, grad_SO) if in_out else (grad_SO, found)
    if (generated := cpu_products.outer(left, right, offsets_E)) is not None:
        return generated
    if _all_at_once(found):
        return expert_outer(found.gathered(), grad_SO, offsets_E, in_out)
    return outer_by_expert(found, grad_SO, offsets_E.tolist(), in_out)


def _rows(x_TH: Tensor, order_S: Tensor, slot_TK: Tensor) -> TokenRows:
    return TokenRows(x_TH, rows.tokens_of(order_S, slot_TK))


def _all_at_once(found: TokenRows) -> bool:
    return found.device.type != "cpu" or found.nbytes <= _AT_ONCE


def _check(x_TH: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool) -> None:
    check_weights("token_linear", "weights", weights)
    width = in_width(weights, in_out)
    if x_TH.dim() != 2 or x_TH.shape[1] != width:
        raise bad_operand("token_linear", "x", f"has shape {tuple(x_TH.shape)}", f"the weight takes rows of {width}")
    if offsets_E.shape != (num_experts(weights),):
        shape = tuple(offsets_E.shape)
        raise bad_operand("token_linear", "offsets", f"has shape {shape}", "pass one end for each expert")
    if not x_TH.device == weights[0].device == offsets_E.device:
        where = ", ".join(str(t.device) for t in (x_TH, weights[0], offsets_E))
        raise bad_operand("token_linear", "operands", f"lie on {where}", "move them to one device")


def _fake_linear(
    x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool
) -> Tensor:
    _check(x_TH, weights, offsets_E, in_out)
    return x_TH.new_empty(order_S.shape[0], out_width(weights, in_out))


def _fake_outer(
    x_TH: Tensor, order_S: Tensor, slot_TK: Tensor, grad_SO: Tensor, offsets_E: Tensor, in_out: bool
) -> Tensor:
    left, right = (x_TH, grad_SO) if in_out else (grad_SO, x_TH)
    return x_TH.new_empty(offsets_E.shape[0], left.shape[1], right.shape[1])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TH, order_S, slot_TK, weights, offsets_E, ctx.in_out = inputs
    needs_x, _, _, *needs_weights = ctx.needs_input_grad[: 3 + len(weights)]  # flat here, nested in backward
    ctx.is_stack, ctx.weight_dtype = is_stack(weights), weights[0].dtype
    ctx.save_for_backward(
        x_TH if any(needs_weights) else None, order_S, slot_TK, offsets_E, *(weights if needs_x else ())
    )


def _linear_backward(ctx: Any, grad_SO: Tensor) -> tuple[Any, ...]:
    x_TH, order_S, slot_TK, offsets_E, *weights = ctx.saved_tensors
    needs_x, _, _, needs_weights, *_ = ctx.needs_input_grad
    ops, grad_x = torch.ops.samoyeds, None
    grads: list[Tensor | None] = [None] * len(needs_weights)
    if needs_x:
        back_SH = ops.expert_linear(grad_SO, weights, offsets_E, not ctx.in_out)
        grad_x = rows.collect(back_SH, order_S, slot_TK, offsets_E)
    if any(needs_weights):
        grad_E = ops.token_outer(x_TH, order_S, slot_TK, grad_SO, offsets_E, ctx.in_out).to(ctx.weight_dtype)
        grads = weight_grads(grad_E, ctx.is_stack, needs_weights)
    return grad_x, None, None, grads, None, None


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.in_out = inputs
    ctx.save_for_backward(*tensors)


def _outer_backward(ctx: Any, grad_E: Tensor) -> tuple[Any, ...]:
    x_TH, order_S, slot_TK, grad_SO, offsets_E = ctx.saved_tensors
    ops = torch.ops.samoyeds
    back_SH = ops.expert_linear(grad_SO, [grad_E], offsets_E, not ctx.in_out)
    grad_x = rows.collect(back_SH, order_S, slot_TK, offsets_E)
    grad_rows = ops.token_linear(x_TH, order_S, slot_TK, [grad_E], offsets_E, ctx.in_out)
    return grad_x, None, None, grad_rows, None, None


define_opaque(
    "token_linear(Tensor x, Tensor order, Tensor slot, Tensor[] weights, Tensor offsets, bool in_out) -> Tensor",
    token_linear, _fake_linear,
)  # fmt: skip
define_opaque(
    "token_outer(Tensor x, Tensor order, Tensor slot, Tensor grad, Tensor offsets, bool in_out) -> Tensor",
    token_outer, _fake_outer,
)  # fmt: skip
register_autograd("token_linear", _linear_backward, _save_linear)
register_autograd("token_outer", _outer_backward, _save_outer)
