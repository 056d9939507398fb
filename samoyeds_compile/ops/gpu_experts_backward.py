"""``samoyeds::gpu_experts_backward``: the gradients of `gpu_experts`, by Triton kernels; packed weights are frozen.

Nothing but operands is kept for it: the plan and the first projection are computed again, which costs two of the eight
products of a training step and saves [S, 2I] rows. It is one op so that no partitioner moves that into the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samoyeds_codegen.triton.prove import on
from samoyeds_codegen.triton.spec import ExpertsSpec
from samoyeds_compile.ops.gpu_experts import whole_sides
from samoyeds_compile.ops.library import bad_operand, define_opaque, register_autograd
from samoyeds_compile.ops.operands import is_stack, num_experts, weight_grads

OP = "gpu_experts_backward"
WANTED = ("x", "expert_weights", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
"""What has a gradient, in the order in which they are returned."""


def gpu_experts_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    kernel: str,
    width: int,
    gate_up_layout: str,
    weight_layout: str,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The gradients of `gpu_experts` that are wanted, and no others.

    Args:
        grad_TH: the gradient of its result, floating.
        x_TH ... weight_layout: its operands.
        wanted: for each of `WANTED` whether it is computed; False for a weight or bias that is absent, and for packed
            weights.

    Returns:
        Those gradients in the order of `WANTED`, in the shapes and dtypes of what they are of, and of matrices as
        one stack. Equal bits in every run.

    Raises:
        OperandError: an operand does not fit the others, or the gradient of a packed weight is wanted.
        KernelError: no kernel can be loaded.
    """
    # Loads sympy, which takes longer to import than the rest of the package.
    from samoyeds_compile.ops.gpu_gradients import Backward, gradients

    spec, names = ExpertsSpec.named(kernel), _names(wanted)
    if spec.pattern is not None and not {"gate", "up", "down"}.isdisjoint(names):
        raise bad_operand(OP, "wanted", f"asks for weights of {spec.pattern}", "train dense weights with a mask")
    if grad_TH.shape != x_TH.shape:
        raise bad_operand(OP, "grad", f"has shape {tuple(grad_TH.shape)}", f"pass {tuple(x_TH.shape)}")
    sides = whole_sides(
        OP, spec, x_TH, expert_ids_TK, expert_weights_TK, gate, up, down, gate_bias_E, up_bias_E, down_bias_E, width,
        gate_up_layout, weight_layout,
    )  # fmt: skip
    given = (x_TH, expert_weights_TK, gate, up, down, gate_bias_E, up_bias_E, down_bias_E)
    x, grad = (t if t.stride(1) == 1 else t.contiguous() for t in (x_TH, grad_TH.to(x_TH.dtype)))
    with on(x_TH.device):
        call = Backward(x, grad, expert_ids_TK, expert_weights_TK, sides, spec, gate_up_layout, width)
        return gradients(call, dict(zip(names, _wanted(given, wanted), strict=True)), weight_layout == "in_out")


def _names(wanted: Sequence[bool]) -> list[str]:
    return [name for name, is_wanted in zip(WANTED, wanted, strict=True) if is_wanted]


def _wanted(given: Sequence[Any], wanted: Sequence[bool]) -> list[Tensor]:
    """The operands whose gradient is wanted, those that are weights as a tensor of the shape of their stack."""
    found = [of for of, is_wanted in zip(given, wanted, strict=True) if is_wanted]
    return [of if isinstance(of, Tensor) else of[0].expand(num_experts(of), -1, -1) for of in found]


def _fake(grad_TH: Tensor, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, *rest: Any) -> list[Tensor]:
    found = _wanted((x_TH, weights_TK, *rest[:6]), rest[-1])
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in found]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ids, weights, gate, up, down, *biases = inputs[:9]
    ctx.sizes, ctx.options = [len(gate), len(up), len(down)], inputs[9:13]
    ctx.save_for_backward(x, ids, weights, *gate, *up, *down, *biases)


def _backward(ctx: Any, grad_TH: Tensor) -> tuple[Any, ...]:
    x, ids, weights, *rest = ctx.saved_tensors
    parts = []
    for size in ctx.sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    needs_x, _, needs_weights, *needs = ctx.needs_input_grad[:9]
    wanted = [needs_x, needs_weights, *(any(of) for of in needs[:3]), *needs[3:]]
    found = iter(torch.ops.samoyeds.gpu_experts_backward(grad_TH, x, ids, weights, *parts, *rest, *ctx.options, wanted))
    grads = [next(found) if is_wanted else None for is_wanted in wanted]
    stacks = [
        [None] * len(of) if grad is None else weight_grads(grad, is_stack(weights), of)
        for grad, of, weights in zip(grads[2:5], needs[:3], parts, strict=True)
    ]
    options = len(ctx.needs_input_grad) - 9  # those with a default may not have been passed
    return grads[0], None, grads[1], *stacks, *grads[5:], *[None] * options


define_opaque(
    f"{OP}(Tensor grad, Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
    "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str kernel, int width, str gate_up_layout, "
    "str weight_layout, bool[] wanted) -> Tensor[]",
    gpu_experts_backward,
    _fake,
)
register_autograd("gpu_experts", _backward, _save)
