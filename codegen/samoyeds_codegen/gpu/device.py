"""What a device can do, in the few numbers that the cost model reads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: of the product; measured choices are kept by it.
        capability: major and minor.
        processors: multiprocessors.
        clock: Hz.
        bandwidth: bytes a second of its memory.
    """

    name: str
    capability: tuple[int, int]
    processors: int
    clock: float
    bandwidth: float

    @property
    def flops_per_clock(self) -> int:
        """Of a multiprocessor: dense products of 16-bit floats, summed in float32, by the fastest instruction."""
        return next((flops for least, flops in FLOPS_PER_CLOCK if self.capability >= least), FLOPS_PER_CLOCK[-1][1])

    @property
    def mma_share(self) -> float:
        """What warps (``mma.sync``) reach of that; on some devices only newer instructions reach all of it."""
        return MMA_SHARE.get(self.capability[0], 1.0)

    @property
    def cache_bandwidth(self) -> float:
        """Bytes a second from the second-level cache."""
        return CACHE_BYTES_PER_CLOCK * self.processors * self.clock


FLOPS_PER_CLOCK = (((12, 0), 1024), ((10, 0), 8192), ((9, 0), 4096), ((8, 6), 1024), ((8, 0), 2048))
"""From NVIDIA's data sheets: TFLOP/s over multiprocessors and clock."""
MMA_SHARE = {9: 0.6, 10: 0.3}
"""By generation; of Hopper by public microbenchmarks, of data-centre Blackwell assumed."""
CACHE_BYTES_PER_CLOCK = 24
"""Of a multiprocessor; assumed, not measured."""
CLOCK, BANDWIDTH = 1.5e9, 1.5e12
"""Where the driver does not say; only comparisons on one device matter."""
NONE = Device("cpu", (8, 0), 64, CLOCK, BANDWIDTH)
"""Stands in where kernels are interpreted."""


@functools.cache
def device_of(device: torch.device) -> Device:
    """The numbers of a CUDA device; `NONE` for any other."""
    if device.type != "cuda":
        return NONE
    found = torch.cuda.get_device_properties(device)
    clock = getattr(found, "clock_rate", 0) * 1e3 or CLOCK
    width = getattr(found, "memory_bus_width", 0) / 8
    bandwidth = 2 * getattr(found, "memory_clock_rate", 0) * 1e3 * width or BANDWIDTH
    return Device(found.name, (found.major, found.minor), found.multi_processor_count, clock, bandwidth)
