"""Kernels as callables over tensors: what is launched, on how many programs. Nothing here waits for the device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from samoyeds_codegen.errors import CompilationError
from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.emit import emit, emit_plan
from samoyeds_codegen.triton.operands import Side, bias_arguments
from samoyeds_codegen.triton.spec import KernelSpec

COMBINED_COLS = 512
"""Columns of a token that one program sums, or copies."""


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of any device.

    Raises:
        CompilationError: there is no Triton.
    """
    try:
        import triton
    except ImportError as error:
        raise CompilationError(f"Triton cannot be imported ({error}); install triton") from error
    return bool(triton.knobs.runtime.interpret)


class Projection:
    """One loaded projection.

    Args:
        spec: what it computes.
        text: its text; that of `emit` unless a test wants another.

    Raises:
        KernelError: it cannot be loaded.
    """

    def __init__(self, spec: KernelSpec, text: str | None = None) -> None:
        self.spec, self.upcast = spec, interprets() and spec.experts.dtype == "bfloat16"
        self.function = load_text(spec.op, text or emit(spec)).project

    def __call__(
        self, x: Tensor, order_S: Tensor | None, top_k: int, tiles: Tensor, sides: Mapping[str, Side], out_SO: Tensor
    ) -> None:  # fmt: skip
        """Compute the rows of ``out_SO`` that belong to an expert; others stay as they are.

        Args:
            x: [T, inputs] for ``up`` and ``back``, or [S, inputs] in slot order if there is no order, and always for
                ``down``; columns contiguous, rows by any stride.
            order_S: int64, position of each slot among the ids made flat; None if rows were gathered before.
            top_k: K.
            tiles: work list of `work_list` for the slots of this tile.
            sides: a weight for each name of `KernelSpec.sides`.
            out_SO: [S, outputs], columns contiguous.
        """
        back, tile = self.spec.op == "back", self.spec.tile
        inputs, outputs = x.shape[1], out_SO.shape[1]
        rows, cols = (inputs, outputs) if back else (outputs, inputs)
        programs = tiles.shape[0] * -(-outputs // self.spec.outputs)
        if programs == 0:
            return
        weights: dict[str, Any] = {}
        for side, of in sides.items():
            weights |= of.arguments(side) | ({} if back else bias_arguments(side, of.bias))
        self.function[(programs,)](
            X=x, x_stride=x.stride(0), ORDER=order_S, top_k=top_k, TILES=tiles, tiles=tiles.shape[0], rows=rows,
            cols=cols, **weights, OUT=out_SO, out_stride=out_SO.stride(0), UPCAST=self.upcast,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def projection(spec: KernelSpec) -> Projection:
    """The projection of a specification; a process loads each once."""
    return Projection(spec)


@functools.cache
def _plan() -> ModuleType:
    return load_text("plan", emit_plan())


def most_tiles(slots: int, experts: int, tile_slots: int) -> int:
    """How many tiles S slots of E experts can need at most."""
    return min(slots, experts) + slots // tile_slots


def work_list(offsets_E: Tensor, slots: int, tile_slots: int) -> Tensor:
    """The tiles of a plan, int32 [`most_tiles`, 4]: expert, first slot, slots (0 beyond the last tile), 0.

    Args:
        offsets_E: int32, where each expert's slots end.
        slots: S.
        tile_slots: slots of a tile.
    """
    experts = offsets_E.shape[0]
    tiles = torch.empty(most_tiles(slots, experts, tile_slots), 4, dtype=torch.int32, device=offsets_E.device)
    if tiles.shape[0]:
        width = 1 << max(experts - 1, 1).bit_length()
        _plan().tiles[(tiles.shape[0],)](offsets_E, tiles, experts, EXPERTS=width, SLOTS=tile_slots, num_warps=1)
    return tiles


def gather(x_TH: Tensor, order_S: Tensor, top_k: int, offsets_E: Tensor) -> Tensor:
    """[S, H]: the token of each slot that belongs to an expert, in slot order; other rows are undefined.

    Args:
        x_TH: tokens, columns contiguous.
        order_S: int64, position of each slot among the ids made flat.
        top_k: K.
        offsets_E: int32, where each expert's slots end.
    """
    slots, cols = order_S.shape[0], x_TH.shape[1]
    out_SH = x_TH.new_empty(slots, cols)
    if slots * cols:
        grid = (slots, -(-cols // COMBINED_COLS))
        _plan().gather[grid](
            x_TH, x_TH.stride(0), order_S, top_k, offsets_E, offsets_E.shape[0], out_SH, out_SH.stride(0), cols,
            COLS=COMBINED_COLS, num_warps=4,
        )  # fmt: skip
    return out_SH


def combine(y_SH: Tensor, slot_TK: Tensor, weights_TK: Tensor, offsets_E: Tensor, out_TH: Tensor) -> None:
    """Sum each token's K rows times its routing weights in float32, k ascending, into ``out_TH``.

    Args:
        y_SH: rows in slot order, columns contiguous; those that belong to nobody are not read.
        slot_TK: int64, contiguous, the slot of (t, k).
        weights_TK: routing weights, floating, by any strides.
        offsets_E: int32, where each expert's slots end.
        out_TH: the result, columns contiguous.
    """
    tokens, top_k = slot_TK.shape
    cols = out_TH.shape[1]
    if tokens * cols == 0:
        return
    grid = (tokens, -(-cols // COMBINED_COLS))
    _plan().combine[grid](
        y_SH, y_SH.stride(0), slot_TK, weights_TK, *weights_TK.stride(), offsets_E, out_TH, out_TH.stride(0),
        offsets_E.shape[0], top_k, cols, COLS=COMBINED_COLS, num_warps=4,
    )  # fmt: skip
