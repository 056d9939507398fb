"""The arguments of a kernel: tensors become guarded copies, and all of it becomes the bytes of one struct."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch

GUARD = 1 << 16
"""Bytes between two buffers, so that what runs over one does not land in the next."""
ALIGNMENT = 256
"""Of memory that CUDA allocates."""


@dataclass(frozen=True, eq=False)
class Output:
    """A tensor that the kernel only writes: what it has not written may not be read."""

    tensor: torch.Tensor


Argument = Union[torch.Tensor, Output, int, float, None, "ctypes._SimpleCData[Any]"]
"""A pointer, an int32, a float32, a null pointer; a ctypes number where another width is meant."""


@dataclass
class _Extent:
    """Bytes from ``start`` to ``end`` of the process, which one or several arguments lie in."""

    start: int
    end: int
    offset: int
    names: list[str]
    initialised: bool
    copy: int = 0


class Arguments:
    """Guarded copies of the tensors among ``arguments``, and the struct of all of them.

    Raises:
        TypeError: an argument is of no kind that a struct can hold, or a tensor is not on the CPU.
        ValueError: an int does not fit 32 bits.
    """

    def __init__(self, arguments: Sequence[Argument]) -> None:
        self.extents = _merge([_extent(i, a) for i, a in enumerate(arguments) if isinstance(a, (torch.Tensor, Output))])
        size = sum(e.end - e.start + ALIGNMENT + GUARD for e in self.extents) + GUARD + ALIGNMENT
        self._memory = ctypes.create_string_buffer(size)
        self._place()
        self.struct = self._pack(arguments)

    def _place(self) -> None:
        """Copy every extent in, aligned as its storage would be on a GPU."""
        at = ctypes.addressof(self._memory) + GUARD
        for extent in self.extents:
            at += -at % ALIGNMENT
            extent.copy = at + extent.offset % ALIGNMENT
            ctypes.memmove(extent.copy, extent.start, extent.end - extent.start)
            at = extent.copy + extent.end - extent.start + GUARD

    def copy_back(self) -> None:
        """What the kernel wrote goes to the tensors."""
        for extent in self.extents:
            ctypes.memmove(extent.start, extent.copy, extent.end - extent.start)

    def _pack(self, arguments: Sequence[Argument]) -> bytes:
        fields = [self._field(argument) for argument in arguments]
        codes = "".join(code for code, _ in fields)
        # A struct of C ends at a multiple of the largest alignment among its fields.
        largest = max(codes, key=lambda code: struct.calcsize(f"@{code}"), default="b")
        return struct.pack(f"@{codes}0{largest}", *(value for _, value in fields))

    def _field(self, argument: Argument) -> tuple[str, Any]:
        if argument is None:
            return "P", 0
        if isinstance(argument, (torch.Tensor, Output)):
            return "P", self._address(_tensor(argument))
        if isinstance(argument, ctypes._SimpleCData):
            return str(vars(type(argument))["_type_"]), argument.value
        if isinstance(argument, int) and not -(1 << 31) <= argument < 1 << 31:
            raise ValueError(f"{argument} does not fit an int32; pass a ctypes.c_int64")
        if isinstance(argument, (int, float)):
            return ("f" if isinstance(argument, float) else "i"), argument
        raise TypeError(f"a kernel's struct cannot hold a {type(argument).__name__}")

    def _address(self, tensor: torch.Tensor) -> int:
        """Of an empty tensor: a null pointer."""
        at = tensor.data_ptr()
        inside = (e for e in self.extents if tensor.numel() and e.start <= at < e.end)
        return next((at - e.start + e.copy for e in inside), 0)


def _tensor(argument: torch.Tensor | Output) -> torch.Tensor:
    tensor = argument.tensor if isinstance(argument, Output) else argument
    if tensor.device.type != "cpu":
        raise TypeError(f"the emulator takes tensors on the CPU, not on {tensor.device}")
    return tensor


def _extent(number: int, argument: torch.Tensor | Output) -> _Extent:
    """From the first to the last element, whatever the strides are."""
    tensor = _tensor(argument)
    start, elements = tensor.data_ptr(), 0
    if tensor.numel():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + elements * tensor.element_size()
    offset = start - tensor.untyped_storage().data_ptr() if elements else 0
    return _Extent(start, end, offset, [f"argument {number}"], not isinstance(argument, Output))


def _merge(extents: list[_Extent]) -> list[_Extent]:
    """Tensors that share memory share a buffer."""
    merged: list[_Extent] = []
    for extent in sorted((e for e in extents if e.end > e.start), key=lambda e: e.start):
        if merged and extent.start < merged[-1].end:
            merged[-1].end = max(merged[-1].end, extent.end)
            merged[-1].names += extent.names
            merged[-1].initialised |= extent.initialised
        else:
            merged.append(extent)
    return merged
