"""Products of all experts on a CPU, one by one, by generated kernels: what is between them can be differentiated.

Where there is no kernel (another dtype, no compiler), both functions say so by giving nothing, and the caller has
PyTorch's products.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen.cpp.product import ProductKernel, Runs, product_kernel
from samoyeds_codegen.cpp.spec import ProductSpec
from samoyeds_codegen.errors import KernelError, UnsupportedSpecError
from samoyeds_compile.huge_pages import on_huge_pages
from samoyeds_compile.ops.token_rows import TokenRows

logger = logging.getLogger(__name__)

Rows = Tensor | TokenRows


def linear(rows: Rows, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool) -> Tensor | None:
    """`expert_linear` of rows, or of the rows of slots' tokens, which are gathered as kernels want them.

    Returns:
        [S, O]; rows after the last run are zero. None if no kernel computes it.
    """
    if not _are_plain([_tensor(rows), *weights], rows.dtype) or (by_columns := _order(weights, in_out)) is None:
        return None
    if (kernel := _kernel(rows.dtype, "linear", by_columns)) is None:
        return None
    out_SO = on_huge_pages(rows.new_empty(rows.shape[0], weights[0].shape[-1 if in_out else -2]))
    x = _lines(_tensor(rows))
    kernel.linear(x, _runs(rows, offsets_E), weights, in_out, out_SO)
    return out_SO


def outer(left: Rows, right: Rows, offsets_E: Tensor) -> Tensor | None:
    """The sums of ``outer(left[s], right[s])`` over the slots of each expert; at most one side has rows of tokens.

    Returns:
        [E, L, R]; zero for an expert without slots. None if no kernel computes it.
    """
    sides = [_tensor(left), _tensor(right)]
    if not _are_plain(sides, left.dtype) or (kernel := _kernel(left.dtype, "outer", True)) is None:
        return None
    out_ELR = on_huge_pages(left.new_empty(offsets_E.shape[0], left.shape[1], right.shape[1]))
    of_tokens = [isinstance(side, TokenRows) for side in (left, right)]
    runs = _runs(right if of_tokens[1] else left, offsets_E)
    kernel.outer(_lines(sides[0]), _lines(sides[1]), of_tokens, runs, out_ELR)
    return out_ELR


def matrix_product(x_NI: Tensor, matrix: Tensor, in_out: bool, out_NO: Tensor) -> bool:
    """Write ``x @ matrix.T``, or ``x @ matrix`` if ``in_out``, into ``out``, contiguous rows; whether a kernel did."""
    if not _are_plain([x_NI, matrix], x_NI.dtype) or (by_columns := _order([matrix], in_out)) is None:
        return False
    if (kernel := _kernel(x_NI.dtype, "linear", by_columns)) is None:
        return False
    end_1 = torch.full((1,), x_NI.shape[0], dtype=torch.int32)
    kernel.linear(_lines(x_NI), Runs(end_1), [matrix], in_out, out_NO)
    return True


def _tensor(rows: Rows) -> Tensor:
    return rows.x_TH if isinstance(rows, TokenRows) else rows


def _lines(rows: Tensor) -> Tensor:
    """The rows, each contiguous."""
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def _runs(rows: Rows, offsets_E: Tensor) -> Runs:
    ends_E = offsets_E.to(torch.int32).contiguous()
    return Runs(ends_E, rows.token_S.contiguous() if isinstance(rows, TokenRows) else None)


def _are_plain(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether kernels may read the memory of tensors: on a CPU, of this dtype, no subclass with a memory of its own."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.dtype == dtype and t.dim() in (2, 3)
        for t in tensors
    )


def _order(weights: Sequence[Tensor], in_out: bool) -> bool | None:
    """Whether weights of one input are contiguous, else those of one output; None if neither, or not in all alike."""
    first = weights[0]
    if any(w.stride() != first.stride() for w in weights):
        return None
    outputs, inputs = (first.stride(-1), first.stride(-2)) if in_out else (first.stride(-2), first.stride(-1))
    return False if inputs == 1 else True if outputs == 1 else None


@functools.cache
def _kernel(dtype: torch.dtype, product: str, by_columns: bool) -> ProductKernel | None:
    """The kernel, if there is one; a process asks once, as a compiler that fails takes its time each time."""
    try:
        return product_kernel(ProductSpec(str(dtype).removeprefix("torch."), product, by_columns))
    except UnsupportedSpecError:
        return None
    except KernelError as error:
        logger.warning("samoyeds: products of experts are PyTorch's: %s", error)
        return None
