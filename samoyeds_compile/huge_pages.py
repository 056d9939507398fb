"""Large new tensors on huge pages, where the system offers them on request (madvise(2), MADV_HUGEPAGE).

Two things are faster on them. Kernels read weights from many places at once, more than the processor has addresses of
small pages at hand for. And a gradient of experts is written once, into memory that the process just got: the system
gives that out page by page, as it is touched, which in pages of 4 KiB takes as long as the product does with a few tens
of tokens an expert.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

WORTH_IT = 8 * 2**20
"""Bytes: four huge pages. Smaller tensors are mostly in memory that was used before."""


def on_huge_pages(new: Tensor) -> Tensor:
    """The tensor, whose memory the system was asked to have in huge pages; a wish, of which nothing depends.

    Args:
        new: contiguous, not written yet; anything but a large plain one on a CPU is left alone.
    """
    if type(new) is not Tensor or new.device.type != "cpu" or new.nbytes < WORTH_IT or (advise := _advise()) is None:
        return new
    first = -(-new.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    advise(first, new.data_ptr() + new.nbytes - first, mmap.MADV_HUGEPAGE)
    return new


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """madvise(2), if there are huge pages on this system."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function
