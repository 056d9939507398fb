"""Run compiled kernels on a CUDA device through the driver, on PyTorch's current stream.

A launch is data: what, how many blocks, which arguments. So a plan of launches can be looked at, tested and emulated
without a GPU; only `run` needs one.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samoyeds_codegen.cuda.arguments import arguments_of
from samoyeds_codegen.cuda.emit import ENTRY, emit
from samoyeds_codegen.cuda.nvrtc import compile_cubin
from samoyeds_codegen.cuda.spec import SHARED_LIMIT, WGMMA_TARGET, KernelSpec
from samoyeds_codegen.errors import KernelError, UnsupportedSpecError


class LaunchError(KernelError, RuntimeError):
    """The CUDA driver refused to load or to launch a kernel."""


@dataclass(frozen=True)
class Launch:
    """One kernel over a grid.

    Attributes:
        spec: what runs.
        grid: blocks in x and y.
        arguments: a tensor or None for each pointer, whole numbers for the rest.
    """

    spec: KernelSpec
    grid: tuple[int, int]
    arguments: Mapping[str, Tensor | int | None]

    @property
    def packed(self) -> bytes:
        """The arguments as the struct that the kernel takes."""
        values = {name: _number(value) for name, value in self.arguments.items()}
        return arguments_of(self.spec).pack(values)


def _number(value: Tensor | int | None) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value or 0


def target_of(capability: tuple[int, int], wgmma: bool = False) -> str:
    """What to compile for on a device.

    Args:
        capability: as `torch.cuda.get_device_capability` gives it.
        wgmma: whether warpgroups shall multiply; only devices of capability 9.0 can.

    Raises:
        UnsupportedSpecError: the device has no sparse tensor cores that these kernels know.
    """
    major, minor = capability
    if wgmma:
        if capability != (9, 0):
            raise UnsupportedSpecError(f"warpgroups multiply on devices of capability 9.0, not {major}.{minor}")
        return WGMMA_TARGET
    numbers = [int(t.removeprefix("sm_")) for t in SHARED_LIMIT if t != WGMMA_TARGET]
    fitting = [n for n in numbers if n // 10 == major and n % 10 <= minor]
    if not fitting:
        raise UnsupportedSpecError(f"no kernel for devices of capability {major}.{minor}")
    return f"sm_{max(fitting)}"


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Launch all on the current stream of a device; the tensors must live until it is done, as torch's own do.

    Raises:
        KernelError: a kernel cannot be compiled, loaded or launched; the class says why.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        for launch in launches:
            _launch(launch, _load(launch.spec, torch.cuda.current_device()), stream)


def prepare(spec: KernelSpec, device: torch.device) -> None:
    """Compile and load a kernel, which cannot be done while a CUDA graph is captured."""
    with torch.cuda.device(device):
        _load(spec, torch.cuda.current_device())


def _launch(launch: Launch, function: Any, stream: int) -> None:
    from cuda.bindings import driver

    struct = ctypes.create_string_buffer(launch.packed)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
    (x, y), spec = launch.grid, launch.spec
    block, shared = (spec.threads, 1, 1), spec.shared_bytes
    _checked(driver.cuLaunchKernel(function, x, y, 1, *block, shared, stream, ctypes.addressof(parameters), 0))


@functools.lru_cache(maxsize=256)
def _load(spec: KernelSpec, device: int) -> Any:
    """The kernel in the current context; ``device`` is part of the key, as each device has a context of its own."""
    from cuda.bindings import driver

    torch.cuda.init()
    cubin = compile_cubin(emit(spec), spec.target).read_bytes()
    module = _checked(driver.cuModuleLoadData(cubin))
    function = _checked(driver.cuModuleGetFunction(module, ENTRY.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, spec.shared_bytes))
    return function


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status):
        raise LaunchError(f"the CUDA driver says {status.name}")
    return values[0] if values else None
