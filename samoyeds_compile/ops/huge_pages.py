"""Large new tensors on huge pages.

A gradient of experts is written once, into memory that the process just got. The system gives that out page by page, as
it is touched, and in pages of 4 KiB that takes as long as the product does with a few tens of tokens an expert. In
pages of 2 MiB it takes next to nothing; Linux gives these, by default, where a program asks for them (madvise(2),
MADV_HUGEPAGE).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

WORTH_IT = 4 * 2**20
"""Bytes; smaller tensors are mostly in memory that was used before."""


def on_huge_pages(new: Tensor) -> Tensor:
    """The tensor, whose memory the system was asked to have in huge pages; a wish, of which nothing depends.

    Args:
        new: contiguous, not written yet; anything but a large one on a CPU is left alone.
    """
    if new.device.type == "cpu" and new.nbytes >= WORTH_IT and (advise := _advise()) is not None:
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
