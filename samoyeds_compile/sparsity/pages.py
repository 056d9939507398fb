"""Memory for packed weights on huge pages, where the system offers them on request."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

HUGE = 2 << 20
"""Bytes of a huge page."""
_MADV_HUGEPAGE = 14


def advise_huge(tensor: Tensor) -> Tensor:
    """Ask for huge pages behind a new tensor, before anything is written to it; advice, and nothing else changes.

    Kernels read weights from many places at once, more than the processor has addresses of small pages at hand for.
    """
    madvise = _madvise()
    if madvise is None or type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.nbytes < 4 * HUGE:
        return tensor
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return tensor


@functools.cache
def _madvise() -> Callable[..., Any] | None:
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
