"""Gradients of a projection, and the projection that they need again. Nothing here waits for the device.

``y = x @ W[e].T`` over the slots of each expert e. That of the rows is a product by the weight itself: a projection by
the transposed weight if it is dense, a kernel of its own if it is packed. That of the weights, which are dense and may
be thinned out by a mask, sums over the slots of an expert, in slot order, so it is the same in every run.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType

from torch import Tensor

from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.emit import emit_gradients
from samoyeds_codegen.triton.kernel import interprets, projection, work_list
from samoyeds_codegen.triton.matrices import Matrices
from samoyeds_codegen.triton.operands import DenseSide, PackedSide, Side, Stack
from samoyeds_codegen.triton.select import backs, choose, choose_back, kernels
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Tile

OUTER = {"half": Tile(64, 32, 64, 4, 3), "full": Tile(32, 16, 32, 4, 3)}
"""Rows, slots and columns of the gradient of a weight, for 16 and 32 bit dtypes."""


def plain(spec: ExpertsSpec) -> ExpertsSpec:
    """Projections by the same weights, without a gate and an activation."""
    return replace(spec, activation="x", gated=False)


def backward_kernels(plain_spec: ExpertsSpec) -> tuple[KernelSpec, ...]:
    """What a backward may launch for projections that `plain` made, but for the sums over slots."""
    found = kernels(plain_spec)
    if plain_spec.pattern is None:
        return found
    return (*(kernel for kernel in found if kernel.op == "up"), *backs(plain_spec))


def project_tokens(x_TH: Tensor, order_S: Tensor, top_k: int, side: Side, offsets_E: Tensor, out_SO: Tensor) -> None:
    """``W[e] @ x + b[e]`` of the token of each slot of expert e; other rows of ``out_SO`` stay as they are.

    Args:
        x_TH: tokens in the dtype of the weight, columns contiguous.
        order_S: int64, position of each slot among the ids made flat.
        top_k: K.
        side: the weight.
        offsets_E: int32, where each expert's slots end.
        out_SO: columns contiguous.
    """
    _project("up", x_TH, order_S, top_k, side, offsets_E, out_SO)


def row_gradient(
    grad: Tensor, order_S: Tensor | None, top_k: int, side: Side, offsets_E: Tensor, out_SI: Tensor
) -> None:
    """``grad @ W[e]`` for the slots of each expert e; other rows of ``out_SI`` stay as they are.

    Args:
        grad: [S, O] in slot order, or [T, O] of tokens with an order, in the dtype of the weight; columns contiguous.
        order_S: int64, position of each slot among the ids made flat; None if ``grad`` is in slot order.
        top_k: K.
        side: the weight, with zeros where a mask thins it out; its bias has no part in it.
        offsets_E: int32, where each expert's slots end.
        out_SI: columns contiguous.
    """
    if isinstance(side, DenseSide):
        op = "down" if order_S is None else "up"
        _project(op, grad, order_S, top_k, DenseSide(side.weight.mT), offsets_E, out_SI)
        return
    kernel = choose_back(_spec(side), out_SI.shape[0], offsets_E.shape[0])
    tiles = work_list(offsets_E, out_SI.shape[0], kernel.tile.slots)
    projection(kernel)(grad, order_S, top_k, tiles, {"back": side}, out_SI)


def weight_gradient(
    grad_SO: Tensor,
    x: Tensor,
    order_S: Tensor | None,
    top_k: int,
    offsets_E: Tensor,
    mask_EOI: Tensor | None,
    out_EOI: Tensor,
) -> None:
    """``grad.T @ x`` over the slots of each expert; zero for an expert without slots and where the mask is zero.

    Args:
        grad_SO: in slot order, columns contiguous.
        x: what was projected: [S, I] in slot order, or tokens [T, I] with an order; columns contiguous.
        order_S: int64, position of each slot among the ids made flat; None if ``x`` is in slot order.
        top_k: K.
        offsets_E: int32, where each expert's slots end.
        mask_EOI: bool or uint8, by any strides; None keeps all.
        out_EOI: the gradient, by any strides.
    """
    experts, rows, cols = out_EOI.shape
    tile = OUTER["full" if grad_SO.element_size() > 2 else "half"]
    blocks = -(-rows // tile.rows) * -(-cols // tile.cols)
    if blocks * experts == 0:
        return
    mask_strides = (0, 0, 0) if mask_EOI is None else mask_EOI.stride()
    _gradients().outer[(blocks, experts)](
        grad_SO, grad_SO.stride(0), x, x.stride(0), order_S, top_k, offsets_E, rows, cols, mask_EOI, *mask_strides,
        out_EOI, *out_EOI.stride(), ROWS=tile.rows, COLS=tile.cols, SLOTS=tile.slots,
        UPCAST=interprets() and _name(grad_SO) == "bfloat16", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _project(
    op: str, x: Tensor, order_S: Tensor | None, top_k: int, side: Side, offsets_E: Tensor, out_SO: Tensor
) -> None:
    spec, slots = _spec(side), out_SO.shape[0]
    tile = getattr(choose(spec, slots, offsets_E.shape[0]), op)
    tiles = work_list(offsets_E, slots, tile.slots)
    projection(KernelSpec(op, spec, tile))(x, order_S, top_k, tiles, {op: side}, out_SO)


def _spec(side: Side) -> ExpertsSpec:
    """As `plain` has it of a block of which this is a weight."""
    first = next(iter(side.stored.values()))
    pattern = side.pattern if isinstance(side, PackedSide) else None
    return ExpertsSpec(_name(first), pattern, "x", False, isinstance(first, Matrices))


def _name(tensor: Stack) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@functools.cache
def _gradients() -> ModuleType:
    return load_text("gradients", emit_gradients())
