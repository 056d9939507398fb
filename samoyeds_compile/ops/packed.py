"""``samoyeds::unpack`` and ``samoyeds::packed_grouped_mm``: products with packed weights where no kernel reads them.

Both give what the dense weight would give. `samoyeds_compile.sparsity.tensor.PackedTensor` turns into them.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from samoyeds_codegen.cpp.unpack import UnpackKernel, UnpackSpec, unpack_kernel
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.huge_pages import on_huge_pages
from samoyeds_compile.ops import cpu_products
from samoyeds_compile.ops.library import define_opaque
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import PackedWeight
from samoyeds_compile.sparsity.pack import unpack as unpack_weight
from samoyeds_compile.sparsity.strips import from_strips

logger = logging.getLogger(__name__)


def unpack(
    values: Tensor, metadata: Tensor | None, selection: Tensor | None, n: int, m: int, vector: int, inner: str,
    group: int, rows: int, cols: int,
    strips: bool,
) -> Tensor:  # fmt: skip
    """The dense weight [..., rows, cols] of storage (see `PackedWeight`), in strips or canonical."""
    if (kernel := _kernel(values, n, m, vector, inner, group, strips)) is not None:
        out = on_huge_pages(values.new_empty(*values.shape[:-2], rows, cols))
        kernel(values, metadata, selection, out)
        return out
    return unpack_weight(_packed(values, metadata, selection, n, m, vector, inner, group, rows, cols, strips))


def packed_grouped_mm(
    x_SI: Tensor, offsets_E: Tensor, in_out: bool, values: Tensor, metadata: Tensor | None, selection: Tensor | None,
    n: int, m: int, vector: int, inner: str, group: int, rows: int, cols: int, strips: bool,
) -> Tensor:  # fmt: skip
    """``x[s] @ W[e].T`` for the rows s of every expert e, W[e] unpacked one expert after the other on CPU.

    Args:
        x_SI: rows sorted by expert, [S, cols].
        offsets_E: int32, end of each expert's run.
        in_out: multiply by W[e] instead, x being [S, rows].
        values, metadata, selection: of a stack of E matrices [rows, cols].
        n, m, vector, inner, group: of the pattern.
        rows, cols: of a dense matrix.
        strips: whether storage is in strips, else it is canonical.

    Returns:
        [S, rows], or [S, cols] if ``in_out``; rows after the last run are zero.
    """
    pattern = (n, m, vector, inner, group, rows, cols, strips)
    if x_SI.device.type != "cpu":
        weight = unpack(values, metadata, selection, *pattern)
        return torch._grouped_mm(x_SI, weight if in_out else weight.transpose(-2, -1), offs=offsets_E)
    out_SO = x_SI.new_zeros(x_SI.shape[0], cols if in_out else rows)
    kernel = _kernel(values, n, m, vector, inner, group, strips)
    scratch, start = values.new_empty(rows, cols), 0  # one matrix is in memory, of whichever expert
    for expert, end in enumerate(offsets_E.tolist()):
        if end > start:
            kept, codes, choice = values[expert], _of(metadata, expert), _of(selection, expert)
            if kernel is None:
                matrix = unpack(kept, codes, choice, *pattern)
            else:
                kernel(kept, codes, choice, matrix := scratch)
            if not cpu_products.matrix_product(x_SI[start:end], matrix, in_out, out_SO[start:end]):
                torch.mm(x_SI[start:end], matrix if in_out else matrix.t(), out=out_SO[start:end])
        start = max(start, end)
    return out_SO


def _kernel(
    values: Tensor, n: int, m: int, vector: int, inner: str, group: int, strips: bool
) -> UnpackKernel | None:  # fmt: skip
    """What unpacks on a CPU; without a compiler PyTorch does, which takes ten times as long."""
    if values.device.type != "cpu" or not values.is_contiguous():
        return None
    return _loaded(values.element_size(), n, m, vector, group, inner == "2:4", strips)


@functools.cache
def _loaded(*spec: Any) -> UnpackKernel | None:
    """A kernel, if there is one; a process asks once, as a compiler that fails takes its time each time."""
    try:
        return unpack_kernel(UnpackSpec(*spec))
    except KernelError as error:
        logger.warning("samoyeds: PyTorch unpacks weights: %s", error)
        return None


def _of(stack: Tensor | None, expert: int) -> Tensor | None:
    return None if stack is None else stack[expert]


def _packed(
    values: Tensor, metadata: Tensor | None, selection: Tensor | None, n: int, m: int, vector: int, inner: str,
    group: int, rows: int, cols: int,
    strips: bool,
) -> PackedWeight:  # fmt: skip
    packed = PackedWeight(values, metadata, selection, (rows, cols), SparsityConfig(n, m, vector, inner, group))
    return from_strips(packed) if strips else packed


def _unpack_fake(
    values: Tensor, metadata: Tensor | None, selection: Tensor | None, n: int, m: int, vector: int, inner: str,
    group: int, rows: int, cols: int,
    strips: bool,
) -> Tensor:  # fmt: skip
    return values.new_empty(*values.shape[:-2], rows, cols)


def _grouped_fake(
    x_SI: Tensor, offsets_E: Tensor, in_out: bool, values: Tensor, metadata: Tensor | None, selection: Tensor | None,
    n: int, m: int, vector: int, inner: str, group: int, rows: int, cols: int, strips: bool,
) -> Tensor:  # fmt: skip
    return x_SI.new_empty(x_SI.shape[0], cols if in_out else rows)


_STORED = "Tensor values, Tensor? metadata, Tensor? selection, "
_PATTERN = _STORED + "int n, int m, int vector, str inner, int group, int rows, int cols, bool strips"
define_opaque(f"unpack({_PATTERN}) -> Tensor", unpack, _unpack_fake)
define_opaque(
    f"packed_grouped_mm(Tensor x, Tensor offsets, bool in_out, {_PATTERN}) -> Tensor", packed_grouped_mm, _grouped_fake
)
