"""What `gpu_experts_backward` launches: Triton for products and sums over tokens, torch for what is elementwise.

With ``z = up x + b`` and ``h = act(z)`` of each slot, ``out = sum over k of w (down h + c)`` and the gradient g of out:
``back = down' g`` is the gradient of ``w h``, so ``<h, back> + <c, g>`` is that of w and ``w back`` that of h. Rows of
slots that belong to nobody are undefined throughout and never read into a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_codegen.triton.gradients import project_tokens, row_gradient, weight_gradient
from samoyeds_codegen.triton.kernel import combine
from samoyeds_codegen.triton.operands import Side
from samoyeds_codegen.triton.spec import ExpertsSpec
from samoyeds_compile.ops import rows
from samoyeds_compile.ops.expert_up import split_gate
from samoyeds_compile.ops.gradient import pull_back
from samoyeds_compile.ops.route import Plan, route


@dataclass(frozen=True)
class Backward:
    """A call. What several gradients need is computed once, when the first of them asks.

    Attributes:
        x, grad: tokens and the gradient of the result, [T, H] of the dtype of the weights, columns contiguous.
        ids_TK, weights_TK: expert ids and routing weights.
        sides: the parameters by name; one that has gate and up is ``up``, whole.
        spec: the block.
        gate_up_layout: one of `operands.GATE_UP_LAYOUTS`. Packed storage has all gate rows first also if it is
            ``interleaved``; the bias alternates then.
        width: I.
    """

    x: Tensor
    grad: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    sides: Mapping[str, Side]
    spec: ExpertsSpec
    gate_up_layout: str
    width: int

    @cached_property
    def plan(self) -> Plan:
        """The plan of the forward, sorted again."""
        return route(self.ids_TK, self.sides["down"].experts)

    @property
    def first(self) -> list[str]:
        """Names of the parameters of the first projection."""
        return [name for name in self.sides if name != "down"]

    @cached_property
    def weight_S1(self) -> Tensor:
        """Routing weight of every slot, 0 where it belongs to nobody."""
        return rows.slot_weights(self.weights_TK, self.plan.order_S, self.plan.offsets_E).unsqueeze(-1)

    @cached_property
    def back_SI(self) -> Tensor:
        """``down' g`` of every slot."""
        plan, out = self.plan, self.grad.new_empty(self.plan.order_S.shape[0], self.width)
        row_gradient(self.grad, plan.order_S, self.ids_TK.shape[1], self.sides["down"], plan.offsets_E, out)
        return out

    @cached_property
    def h_SI(self) -> Tensor:
        """Activated rows, if no gradient of the first projection is wanted; else `through` has them too."""
        return self._activated(*self._z)

    @cached_property
    def through(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Activated rows [S, I], and for each parameter of the first projection the gradient of what it gives."""
        h_SI, grads = pull_back(
            self._activated, self._z, lambda h_SI: (self.back_SI * self.weight_S1).to(h_SI.dtype)
        )  # fmt: skip
        return h_SI, dict(zip(self.first, grads, strict=True))

    @property
    def bias_alternates(self) -> bool:
        """Whether the bias of gate and up has their rows in turn, and the weight has all gate rows first."""
        return self.spec.pattern is not None and self.gate_up_layout == "interleaved"

    @property
    def _z(self) -> list[Tensor]:
        return [self._projected(self.sides[name]) for name in self.first]

    def _activated(self, *z: Tensor) -> Tensor:
        layout = "concatenated" if self.bias_alternates else self.gate_up_layout
        given = dict(zip(self.first, z, strict=True)) if len(z) > 1 else split_gate(z[0], layout)
        return expr.evaluate(self.spec.activation, given).to(self.x.dtype)  # type: ignore[no-any-return]

    def _projected(self, side: Side) -> Tensor:
        plan, out = self.plan, self.x.new_empty(self.plan.order_S.shape[0], side.rows)
        if self.bias_alternates and side.bias is not None:
            side = replace(side, bias=side.bias.unflatten(1, (-1, 2)).mT.flatten(1))
        project_tokens(self.x, plan.order_S, self.ids_TK.shape[1], side, plan.offsets_E, out)
        return out


def gradients(call: Backward, like: Mapping[str, Tensor], in_out: bool) -> list[Tensor]:
    """The gradients of what ``like`` names, in its order, in shape and dtype equal to its tensors.

    Args:
        call: what was computed.
        like: by names of `WANTED`.
        in_out: whether weights are [E, in, out].
    """
    found: dict[str, Tensor] = {}
    through_first = {"x", *(f"{name}{end}" for name in call.first for end in ("", "_bias"))}
    h_SI = call.through[0] if through_first & like.keys() else None
    for name, tensor in like.items():
        if name == "x":
            found[name] = _of_x(call)
        elif name == "expert_weights":
            found[name] = _of_routing(call, call.h_SI if h_SI is None else h_SI).to(tensor.dtype)
        elif name == "down":
            found[name] = _of_down(call, call.h_SI if h_SI is None else h_SI, tensor, in_out)
        elif name in call.first:
            found[name] = _of_first(call, name, tensor, in_out)
        else:
            found[name] = _of_bias(call, name.removesuffix("_bias")).sum_to_size(tensor.shape).to(tensor.dtype)
    return list(found.values())


def _of_x(call: Backward) -> Tensor:
    """[T, H]: each token's rows of ``up' dz``, summed in float32."""
    plan, tokens = call.plan, call.x.shape[0]
    ones_TK = call.x.new_ones(1, 1, dtype=torch.float32).expand(tokens, plan.slot_TK.shape[1])
    parts = []
    for name, grad in call.through[1].items():
        back_SH = call.x.new_empty(grad.shape[0], call.x.shape[1])
        row_gradient(grad, None, 1, call.sides[name], plan.offsets_E, back_SH)
        part = call.x.new_empty(call.x.shape, dtype=torch.float32)
        combine(back_SH, plan.slot_TK, ones_TK, plan.offsets_E, part)
        parts.append(part)
    return sum(parts[1:], parts[0]).to(call.x.dtype)


def _of_routing(call: Backward, h_SI: Tensor) -> Tensor:
    """[T, K], in float32."""
    plan, bias_EH = call.plan, call.sides["down"].bias
    dots_S = (call.back_SI.float() * h_SI).sum(-1)
    if bias_EH is not None:
        grad_SH = rows.dispatch(call.grad, plan.order_S, plan.slot_TK, plan.offsets_E)
        dots_S = dots_S + (grad_SH.float() * rows.expert_rows(bias_EH, plan.expert_S, plan.offsets_E)).sum(-1)
    return rows.of_slots(dots_S, plan.slot_TK, plan.offsets_E)


def _of_down(call: Backward, h_SI: Tensor, like: Tensor, in_out: bool) -> Tensor:
    """The sum of ``w h g'``: the rows of g are gathered, so it is computed as [E, I, H]."""
    plan, out = call.plan, _empty(like)
    weighted_SI = (h_SI * call.weight_S1).to(call.x.dtype)
    turned = out if in_out else out.mT
    weight_gradient(
        weighted_SI, call.grad, plan.order_S, plan.slot_TK.shape[1], plan.offsets_E, None, turned
    )  # fmt: skip
    return out


def _of_first(call: Backward, name: str, like: Tensor, in_out: bool) -> Tensor:
    """The sum of ``dz x'``, of a parameter [E, rows, H]."""
    plan, out = call.plan, _empty(like)
    grad_S = call.through[1][name]
    weight_gradient(
        grad_S, call.x, plan.order_S, plan.slot_TK.shape[1], plan.offsets_E, None, out.mT if in_out else out
    )  # fmt: skip
    return out


def _of_bias(call: Backward, name: str) -> Tensor:
    """[E, rows]: sums of each expert's rows, as the gradient of a weight whose other side is one column."""
    plan, side = call.plan, call.sides[name]
    out = call.x.new_empty(side.experts, side.rows, 1, dtype=torch.float32)
    if name == "down":
        weight_S1 = call.weight_S1.to(call.x.dtype)
        weight_gradient(
            weight_S1, call.grad, plan.order_S, plan.slot_TK.shape[1], plan.offsets_E, None, out.mT
        )  # fmt: skip
    else:
        grad_S = call.through[1][name]
        ones_S1 = grad_S.new_ones(1, 1).expand(grad_S.shape[0], 1)
        weight_gradient(grad_S, ones_S1, None, 1, plan.offsets_E, None, out)
    out_EO = out.squeeze(-1)
    alternates = call.bias_alternates and name == "up"
    return out_EO.unflatten(1, (2, -1)).mT.flatten(1) if alternates else out_EO


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)
