"""``samoyeds::range_enter`` and ``samoyeds::range_exit``: a named range in PyTorch's profiler, tied to the data.

Inductor drops ``torch.profiler.record_function`` from graphs, and what has no operands could be moved anywhere. So what
a block reads goes through one op and what it computes through the other; each hands on a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.ops.library import define_opaque, register_autograd

_ENTER, _EXIT = torch.ops.profiler._record_function_enter.default, torch.ops.profiler._record_function_exit.default


def _handle_size() -> int:
    """Bytes in PyTorch's handle of a range, which depend on how PyTorch was built."""
    handle = _ENTER("samoyeds", None)
    _EXIT(handle)
    return int(handle.numel())


_HANDLE_SIZE = _handle_size()


def range_enter(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Begin a range of the profiler.

    Args:
        x: what the block reads first, of any shape, dtype and device.
        name: of the range.

    Returns:
        A copy of x, and a handle (uint8, on the CPU) for `range_exit`; a range also ends when its handle is freed.
    """
    copy = x.clone()
    return copy, _ENTER(name, None)


def range_exit(y: Tensor, handle: Tensor) -> Tensor:
    """End the range of ``handle``; returns a copy of y, what the block computed."""
    _EXIT(handle)
    return y.clone()


def _enter_fake(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    return x.clone(), torch.empty(_HANDLE_SIZE, dtype=torch.uint8, device="cpu")


def _exit_fake(y: Tensor, handle: Tensor) -> Tensor:
    return y.clone()


def _pass_on(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:
    return gradient, None


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    """The derivative is the identity's."""


define_opaque("range_enter(Tensor x, str name) -> (Tensor, Tensor)", range_enter, _enter_fake)
define_opaque("range_exit(Tensor y, Tensor handle) -> Tensor", range_exit, _exit_fake)
for _name in ("range_enter", "range_exit"):
    register_autograd(_name, _pass_on, _keep_nothing)
