"""Memory that is written for the first time: the system hands it out in pages, a fault for each.

Gradients of expert weights are the largest tensors of a training step and new in every step. With pages of 4 KiB the
faults take longer than the products for few tokens an expert; pages of 2 MiB make them rare. PyTorch does the same for
all its memory if ``THP_MEM_ALLOC_ENABLE`` is set.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

_LEAST = 4 * 2**20
"""Bytes: smaller ones may come from memory that the process holds already."""
Advise = Callable[[ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], int]


def in_large_pages(tensor: Tensor) -> Tensor:
    """The tensor, on large pages if it lies in the memory of a CPU whose system offers them; its values stay.

    Args:
        tensor: contiguous.
    """
    advise = _advise() if tensor.device.type == "cpu" and tensor.nbytes >= _LEAST else None
    if advise is not None:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return tensor


@functools.cache
def _advise() -> Advise | None:
    """``madvise``, whose advice may be refused without harm; None where there is none for large pages (not Linux)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
