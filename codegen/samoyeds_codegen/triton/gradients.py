"""Gradients of a projection of dense weights, which a mask may thin out, and the projection that they need again.

Nothing here waits for the device.

``y = x @ W[e].T`` over the slots of each expert e. That of the rows is a projection itself, by the transposed weight;
that of the weights sums over the slots of an expert, in slot order, so it is the same in every run.
"""

from __future__ import annotations

import functools
from types import ModuleType

from torch import Tensor

from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.emit import emit_gradients
from samoyeds_codegen.triton.kernel import interprets, projection, work_list
from samoyeds_codegen.triton.matrices import Matrices
from samoyeds_codegen.triton.operands import DenseSide, Stack
from samoyeds_codegen.triton.select import choose
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Tile

OUTER = {"half": Tile(64, 32, 64, 4, 3), "full": Tile(32, 16, 32, 4, 3)}
"""Rows, slots and columns of the gradient of a weight, for 16 and 32 bit dtypes."""


def plain(dtype: str, separate: bool = False) -> ExpertsSpec:
    """Projections of a dtype without an activation, by stacks or by matrices that lie apart."""
    return ExpertsSpec(dtype, None, "x", False, separate)


def project_tokens(
    x_TH: Tensor, order_S: Tensor, top_k: int, side: DenseSide, offsets_E: Tensor, out_SO: Tensor
) -> None:
    """``W[e] @ x + b[e]`` of the token of each slot of expert e; other rows of ``out_SO`` stay as they are.

    Args:
        x_TH: tokens in the dtype of the weight, columns contiguous.
        order_S: int64, position of each slot among the ids made flat.
        top_k: K.
        side: the weight.
        offsets_E: int32, where each expert's slots end.
        out_SO: columns contiguous.
    """
    spec, slots = _spec(side.weight), order_S.shape[0]
    tile = choose(spec, slots, offsets_E.shape[0]).up
    tiles = work_list(offsets_E, slots, tile.slots)
    projection(KernelSpec("up", spec, tile))(x_TH, order_S, top_k, tiles, {"up": side}, out_SO)


def row_gradient(grad_SO: Tensor, weight_EOI: Stack, offsets_E: Tensor, out_SI: Tensor) -> None:
    """``grad @ W[e]`` for the slots of each expert e; other rows of ``out_SI`` stay as they are.

    Args:
        grad_SO: in slot order, columns contiguous, in the dtype of the weight.
        weight_EOI: by any strides, with zeros where a mask thins it out; or matrices that lie apart.
        offsets_E: int32, where each expert's slots end.
        out_SI: columns contiguous.
    """
    slots, experts = grad_SO.shape[0], weight_EOI.shape[0]
    spec = _spec(weight_EOI)
    tile = choose(spec, slots, experts).down
    sides = {"down": DenseSide(weight_EOI.mT)}
    tiles = work_list(offsets_E, slots, tile.slots)
    projection(KernelSpec("down", spec, tile))(grad_SO, offsets_E, 1, tiles, sides, out_SI)


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


def _spec(weight: Stack) -> ExpertsSpec:
    return plain(_name(weight), isinstance(weight, Matrices))


def _name(tensor: Stack) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@functools.cache
def _gradients() -> ModuleType:
    return load_text("gradients", emit_gradients())
