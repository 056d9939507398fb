"""Weight operands, and the checks that several ops share.

A weight operand is a list: one stack of all experts, ``[E, out, in]``, or one matrix an expert, E times ``[out, in]``
(the last two dimensions swapped if the layout is ``in_out``). Their rank tells them apart, also if E is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.ops.library import bad_operand

GATE_UP_LAYOUTS = ("concatenated", "interleaved", "separate", "none")
"""Where gate and up lie in the first projection: halves, even and odd features, two weights, or no gate at all."""
WEIGHT_LAYOUTS = ("out_in", "in_out")
WEIGHTINGS = ("output", "input")
"""What the routing weights multiply: the results of the experts, or the rows that go in."""


def is_stack(weights: Sequence[Tensor]) -> bool:
    """Whether a weight operand is one stack."""
    return len(weights) == 1 and weights[0].dim() == 3


def num_experts(weights: Sequence[Tensor]) -> int:
    """E."""
    return weights[0].shape[0] if is_stack(weights) else len(weights)


def in_width(weights: Sequence[Tensor], in_out: bool) -> int:
    """Width of the rows that the matrices take."""
    return weights[0].shape[-2 if in_out else -1]


def out_width(weights: Sequence[Tensor], in_out: bool) -> int:
    """Width of the rows that the matrices give."""
    return weights[0].shape[-1 if in_out else -2]


def weight_grads(grad_E: Tensor, stacked: bool, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of all experts, [E, out, in], as one for each tensor of the operand, None where none is needed."""
    grads = [grad_E] if stacked else grad_E.unbind(0)
    return [grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)]


def check_weights(op: str, name: str, weights: Sequence[Tensor]) -> None:
    """Raise `OperandError` unless ``weights`` is one stack, or matrices of one shape, dtype and device."""
    if is_stack(weights):
        return
    if not weights:
        raise bad_operand(op, name, "is empty", "pass [E, out, in], or one matrix an expert")
    first = weights[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) != 2:
        holds = f"holds {len(weights)} tensors, the first of rank {len(shape)}"
        raise bad_operand(op, name, holds, "pass [E, out, in], or one matrix an expert")
    if all(w.shape == shape and w.dtype == dtype and w.device == device for w in weights):
        return
    kinds = ", ".join(sorted({f"{list(w.shape)} {w.dtype} on {w.device}" for w in weights}))
    raise bad_operand(op, name, f"holds {kinds}", "give all experts matrices of one shape, dtype and device")


def check_experts(op: str, gate_E: Sequence[Tensor], up_E: Sequence[Tensor], down_E: Sequence[Tensor]) -> None:
    """Raise `OperandError` unless the projections are well formed and have the same number of experts."""
    named = {"up": up_E, "down": down_E} | ({"gate": gate_E} if gate_E else {})
    for name, weights in named.items():
        check_weights(op, name, weights)
        if num_experts(weights) != num_experts(up_E):
            reason = f"has {num_experts(weights)} experts and up {num_experts(up_E)}"
            raise bad_operand(op, name, reason, "pass a matrix for each expert")


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `OperandError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise bad_operand(op, name, f"is {value!r}", f"use one of {tuple(choices)}")


def check_gate(op: str, gate_E: Sequence[Tensor], gate_up_layout: str) -> None:
    """Raise `OperandError` unless the layout exists and there is a gate of its own if and only if it says so."""
    check_choice(op, "gate_up_layout", gate_up_layout, GATE_UP_LAYOUTS)
    if bool(gate_E) != (gate_up_layout == "separate"):
        raise bad_operand(op, "gate", "does not fit the layout", "pass it with layout 'separate' and only then")


def check_activation(op: str, activation: str, gate_up_layout: str) -> None:
    """Raise `OperandError` if the activation reads what the layout does not offer."""
    offered = {expr.PLAIN_NAME} if gate_up_layout == "none" else set(expr.GATED_NAMES)
    read = expr.names(activation)
    if not read <= offered:
        remedy = f"layout {gate_up_layout!r} offers {sorted(offered)}"
        raise bad_operand(op, "activation", f"reads {sorted(read)}", remedy)


def check_bias(op: str, bias_E: Tensor, weights: Sequence[Tensor], in_out: bool) -> None:
    """Raise `OperandError` unless the bias is [E, out] (or [E, 1]) where the weights are."""
    experts, width = num_experts(weights), out_width(weights, in_out)
    if bias_E.dim() != 2 or bias_E.shape[0] != experts or bias_E.shape[1] not in (1, width):
        remedy = f"pass [{experts}, {width}], one row an expert"
        raise bad_operand(op, "bias", f"has shape {tuple(bias_E.shape)}", remedy)
    if bias_E.device != weights[0].device:
        reason = f"lies on {bias_E.device} and the weight on {weights[0].device}"
        raise bad_operand(op, "bias", reason, "move them to one device")


def check_devices(op: str, **operands: Tensor) -> None:
    """Raise `OperandError` unless all operands lie on one device."""
    devices: set[torch.device] = {tensor.device for tensor in operands.values()}
    if len(devices) > 1:
        where = ", ".join(f"{tensor.device} ({name})" for name, tensor in operands.items())
        raise bad_operand(op, "operands", f"lie on {where}", "move them to one device")
