"""``samoyeds::expert_linear`` and ``samoyeds::expert_outer``: the products of all experts, and their derivatives.

``expert_linear`` multiplies each run of rows with its expert's matrix; its two derivatives are ``expert_linear`` with
the matrix flipped (rows) and ``expert_outer`` (matrix): every backward is itself an op, and so is its own backward.
Matrices that are tensors of their own are used where they lie; they are never copied into a stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.huge_pages import on_huge_pages
from samoyeds_compile.ops import cpu_products
from samoyeds_compile.ops.library import bad_operand, define_opaque, register_autograd
from samoyeds_compile.ops.operands import check_weights, in_width, is_stack, num_experts, out_width, weight_grads
from samoyeds_compile.ops.token_rows import TokenRows

Rows = Tensor | TokenRows

_CALL_COST = 4
"""What one call an expert costs, in units of what ``torch._grouped_mm`` spends on an expert without rows (~1.4 us)."""
_STEP, _SHORT = 32, 64
"""On CPU oneDNN makes a kernel for every number of rows, for about a millisecond each, and routing gives new numbers in
every step. So runs of rows longer than the second are taken in multiples of the first, of which there are few."""
_ONEDNN = (torch.bfloat16, torch.float16)
"""Dtypes whose products oneDNN computes."""
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16
"""Bytes to which ``torch._grouped_mm`` wants rows and base addresses aligned."""


def expert_linear(x_SI: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool) -> Tensor:
    """``x[s] @ W[e]`` for the rows s of every expert e.

    On a CPU it is a generated kernel, if there is one (`cpu_products`), else, and elsewhere: one stack is one grouped
    product where the device has one. Separate matrices are one product for each expert that
    has rows; on CUDA this reads the offsets on the host, once a call.

    Args:
        x_SI: rows sorted by expert, contiguous runs.
        weights: one stack [E, O, I] or E matrices [O, I], the last two dimensions swapped if ``in_out``; cast to the
            dtype of x, expert by expert, if it differs.
        offsets_E: int32, end of each expert's run, as `route` gives it.
        in_out: the matrices are stored [in, out].

    Returns:
        [S, O] in the dtype of x; rows after the last run belong to no expert and are undefined.

    Raises:
        OperandError: shapes or devices do not fit.
    """
    _check_linear(x_SI, weights, offsets_E, in_out)
    if (generated := cpu_products.linear(x_SI, weights, offsets_E, in_out)) is not None:
        return generated
    if not is_stack(weights):
        return linear_by_expert(x_SI, weights, offsets_E.tolist(), in_out)
    weight_E = weights[0]
    if x_SI.device.type == "cpu":
        return _linear_cpu(x_SI, weight_E, offsets_E, in_out)
    if _grouped_mm_takes(x_SI, weight_E):
        return torch._grouped_mm(x_SI.contiguous(), _matrices(weight_E, in_out), offs=offsets_E)
    return linear_by_expert(x_SI, weight_E, offsets_E.tolist(), in_out)


def expert_outer(x_SI: Tensor, grad_SO: Tensor, offsets_E: Tensor, in_out: bool) -> Tensor:
    """``sum over rows s of expert e of outer(grad[s], x[s])``: the derivative of `expert_linear` by its weight.

    Returns:
        [E, O, I], or [E, I, O] if ``in_out``; zero for an expert without rows.
    """
    left, right = (x_SI, grad_SO) if in_out else (grad_SO, x_SI)
    if (generated := cpu_products.outer(left, right, offsets_E)) is not None:
        return generated
    if x_SI.device.type != "cpu" and _grouped_mm_takes(x_SI, grad_SO):
        return torch._grouped_mm(left.contiguous().t(), right.contiguous(), offs=offsets_E)
    return outer_by_expert(x_SI, grad_SO, offsets_E.tolist(), in_out)


def outer_by_expert(x_SI: Rows, grad_SO: Tensor, ends: list[int], in_out: bool) -> Tensor:
    """One product for each expert that has rows."""
    left, right = (x_SI, grad_SO) if in_out else (grad_SO, x_SI)
    out = on_huge_pages(x_SI.new_empty(len(ends), left.shape[1], right.shape[1]))
    if len(set(ends) - {0}) < len(ends):
        out.zero_()  # for experts without rows
    for expert, start, end in _runs(ends):
        a, b = left[start:end], right[start:end]
        if _is_costly(x_SI, start, end):
            a, b = _with_zero_rows(a), _with_zero_rows(b)
        torch.mm(a.t(), b, out=out[expert])
    return out


def _linear_cpu(x_SI: Tensor, weight_E: Tensor, offsets_E: Tensor, in_out: bool) -> Tensor:
    """Whichever of one grouped call and one call an expert has less overhead for this routing."""
    ends = offsets_E.tolist()
    active = len(set(ends) - {0})
    mostly_single = _mv_is_faster(x_SI, in_out) and ends[-1] < 2 * active
    costly = any(_is_costly(x_SI, start, end) for _, start, end in _runs(ends))
    one_call_each = mostly_single or costly or (active - 1) * _CALL_COST <= len(ends)
    if one_call_each or not _grouped_mm_takes(x_SI, weight_E):
        return linear_by_expert(x_SI, weight_E, ends, in_out)
    out_SO = torch._grouped_mm(x_SI.contiguous(), _matrices(weight_E, in_out), offs=offsets_E)
    return _zero_after(out_SO, ends[-1])


def _zero_after(out_SO: Tensor, end: int) -> Tensor:
    """On CPU the rows that belong to nobody are zero: it costs nothing and keeps garbage out of debuggers."""
    if end < out_SO.shape[0]:
        out_SO[end:].zero_()
    return out_SO


def linear_by_expert(x_SI: Rows, matrices: Tensor | Sequence[Tensor], ends: list[int], in_out: bool) -> Tensor:
    """One product for each expert that has rows."""
    out_SO = on_huge_pages(x_SI.new_empty(x_SI.shape[0], matrices[0].shape[1 if in_out else 0]))
    use_mv = _mv_is_faster(x_SI, in_out)
    for expert, start, end in _runs_of_few_lengths(x_SI, ends):
        matrix = matrices[expert]
        if matrix.dtype != x_SI.dtype:
            matrix = matrix.to(x_SI.dtype)
        if use_mv and end - start == 1:
            torch.mv(matrix, x_SI[start], out=out_SO[start])
        else:
            torch.mm(x_SI[start:end], matrix if in_out else matrix.t(), out=out_SO[start:end])
    return _zero_after(out_SO, ends[-1])


def _mv_is_faster(x_SI: Rows, in_out: bool) -> bool:
    """On CPU a bf16 matrix-vector product takes 0.7 of the time of an mm of one row; for other dtypes it is slower."""
    return x_SI.dtype == torch.bfloat16 and not in_out and x_SI.device.type == "cpu"


def _runs(ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, start, end) of every expert that has rows."""
    start = 0
    for expert, end in enumerate(ends):
        if end > start:
            yield expert, start, end
            start = end


def _is_costly(rows: Rows, start: int, end: int) -> bool:
    """Whether a product over as many rows may make a kernel first."""
    return end - start > _SHORT and rows.dtype in _ONEDNN and rows.device.type == "cpu"


def _runs_of_few_lengths(rows: Rows, ends: list[int]) -> Iterator[tuple[int, int, int]]:
    """`_runs`; costly ones go on to a multiple of `_STEP`, into rows of later experts, which write them later.

    Where there are no rows to go on into, a run is cut at such a multiple.
    """
    for expert, start, end in _runs(ends):
        more = -(end - start) % _STEP
        if not _is_costly(rows, start, end):
            yield expert, start, end
        elif end + more <= rows.shape[0]:
            yield expert, start, end + more
        else:
            middle = end + more - _STEP
            yield expert, start, middle
            yield expert, middle, end


def _with_zero_rows(rows: Tensor) -> Tensor:
    """Rows up to a multiple of `_STEP`; those added are zero."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % _STEP))


def _matrices(weight_E: Tensor, in_out: bool) -> Tensor:
    return weight_E if in_out else weight_E.transpose(-2, -1)


def _grouped_mm_takes(left: Tensor, right: Tensor) -> bool:
    """Whether ``torch._grouped_mm`` accepts the operands; what it refuses is computed expert by expert."""
    if left.dtype != right.dtype or left.dtype not in _GROUPED_DTYPES or not right.is_contiguous():
        return False
    aligned = _rows_aligned(left) and _rows_aligned(right) and right.data_ptr() % _ALIGNMENT == 0
    return aligned and _on_sm80(left)


def _rows_aligned(tensor: Tensor) -> bool:
    return tensor.shape[-1] * tensor.element_size() % _ALIGNMENT == 0


def _on_sm80(tensor: Tensor) -> bool:
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (8, 0)


def _check_linear(x_SI: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool) -> None:
    if not is_stack(weights) and not _is_uniform(weights):
        check_weights("expert_linear", "weights", weights)
    width = in_width(weights, in_out)
    if x_SI.dim() != 2 or x_SI.shape[1] != width:
        raise bad_operand("expert_linear", "x", f"has shape {tuple(x_SI.shape)}", f"the weight takes rows of {width}")
    if offsets_E.dim() != 1 or offsets_E.shape[0] != num_experts(weights):
        shape = tuple(offsets_E.shape)
        raise bad_operand("expert_linear", "offsets", f"has shape {shape}", "pass one end for each expert")
    if not x_SI.device == weights[0].device == offsets_E.device:
        where = ", ".join(str(t.device) for t in (x_SI, weights[0], offsets_E))
        raise bad_operand("expert_linear", "operands", f"lie on {where}", "move them to one device")


def _is_uniform(weights: Sequence[Tensor]) -> bool:
    """Whether the matrices have one shape: what a wrong result could come from, and all that a kernel has time for."""
    shape = weights[0].shape if weights else ()
    return len(shape) == 2 and all(weight.shape == shape for weight in weights)


def _fake_linear(x_SI: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool) -> Tensor:
    check_weights("expert_linear", "weights", weights)
    _check_linear(x_SI, weights, offsets_E, in_out)
    return x_SI.new_empty(x_SI.shape[0], out_width(weights, in_out))


def _fake_outer(x_SI: Tensor, grad_SO: Tensor, offsets_E: Tensor, in_out: bool) -> Tensor:
    left, right = (x_SI, grad_SO) if in_out else (grad_SO, x_SI)
    return x_SI.new_empty(offsets_E.shape[0], left.shape[1], right.shape[1])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_SI, weights, offsets_E, ctx.in_out = inputs
    needs_x, *needs_weights = ctx.needs_input_grad[: 1 + len(weights)]  # flat here, nested as the inputs in backward
    ctx.is_stack, ctx.weight_dtype = is_stack(weights), weights[0].dtype
    ctx.save_for_backward(x_SI if any(needs_weights) else None, offsets_E, *(weights if needs_x else ()))


def _linear_backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor | None, list[Tensor | None], None, None]:
    x_SI, offsets_E, *weights = ctx.saved_tensors
    ops, grad_x = torch.ops.samoyeds, None
    needs_x, needs_weights = ctx.needs_input_grad[:2]
    if needs_x:
        grad_x = ops.expert_linear(grad_SO, weights, offsets_E, not ctx.in_out)
    if not any(needs_weights):
        return grad_x, [None] * len(needs_weights), None, None
    grad_E = ops.expert_outer(x_SI, grad_SO, offsets_E, ctx.in_out).to(ctx.weight_dtype)
    return grad_x, weight_grads(grad_E, ctx.is_stack, needs_weights), None, None


def _save_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_SI, grad_SO, offsets_E, ctx.in_out = inputs
    ctx.save_for_backward(x_SI, grad_SO, offsets_E)


def _outer_backward(ctx: Any, grad_E: Tensor) -> tuple[Tensor, Tensor, None, None]:
    x_SI, grad_SO, offsets_E = ctx.saved_tensors
    linear = torch.ops.samoyeds.expert_linear
    grad_x = linear(grad_SO, [grad_E], offsets_E, not ctx.in_out)
    return grad_x, linear(x_SI, [grad_E], offsets_E, ctx.in_out), None, None


define_opaque(
    "expert_linear(Tensor x, Tensor[] weights, Tensor offsets, bool in_out) -> Tensor", expert_linear, _fake_linear
)
define_opaque("expert_outer(Tensor x, Tensor grad, Tensor offsets, bool in_out) -> Tensor", expert_outer, _fake_outer)
register_autograd("expert_linear", _linear_backward, _save_linear)
register_autograd("expert_outer", _outer_backward, _save_outer)
