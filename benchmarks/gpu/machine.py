"""The device as the benchmark needs it: timing, memory, what it can do; and a stand-in for a machine without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

FLUSHED = 256 * 2**20
"""Bytes written between calls: several times the last-level cache of any device, as a model of many layers does it."""
WARM = 3
LEAST, MOST = 5, 40
"""Rounds."""


class Machine:
    """A CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.flush = torch.empty(FLUSHED, dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        """Wait for it, so that what went wrong is said here."""
        torch.cuda.synchronize()

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, which leaves the time of the processor out."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def alternate(self, calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
        """Milliseconds of each, round by round, every other round in reverse; caches are cold."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        end = time.monotonic() + seconds
        for number in range(MOST):
            if number >= LEAST and time.monotonic() > end:
                break
            names = list(calls) if number % 2 == 0 else list(reversed(calls))
            events = [(name, self._timed(calls[name])) for name in names]
            self.synchronize()
            for name, (start, stop) in events:
                times[name].append(start.elapsed_time(stop))
        return times

    def _timed(self, call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # takes longer than it takes to launch what follows, so launches are not timed
        start.record()
        call()
        stop.record()
        return start, stop

    def peak(self, call: Callable[[], Any]) -> int:
        """Bytes that a call takes beyond what is there already."""
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Give freed memory back."""
        torch.cuda.empty_cache()

    @property
    def memory(self) -> int:
        """Bytes of the device."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def describe(self) -> dict[str, Any]:
        """For the results."""
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name, "capability": list(torch.cuda.get_device_capability()),
            "processors": properties.multi_processor_count, "memory": properties.total_memory,
            "cuda": torch.version.cuda, "dry": False,
        }  # fmt: skip

    def rates(self) -> tuple[float, float]:
        """Bytes a second that a copy moves, and operations a second of a bfloat16 product: what roofs are made of."""
        source = torch.empty(2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        a, b = (torch.randn(8192, 8192, device=self.device).bfloat16() for _ in range(2))
        times = self.alternate({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, 0.5)
        return 2 * source.nbytes / min(times["copy"]) * 1e3, 2 * 8192**3 / min(times["product"]) * 1e3


class DryMachine(Machine):
    """The processor in place of a device: the whole way is walked, and what it measures means nothing."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call itself."""
        return call

    def alternate(self, calls: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
        """One round."""
        return {name: [_clocked(call)] for name, call in calls.items()}

    def peak(self, call: Callable[[], Any]) -> int:
        """Unknown."""
        call()
        return 1

    def release(self) -> None:
        """Nothing is kept."""

    @property
    def memory(self) -> int:
        """Some."""
        return 2**30

    def describe(self) -> dict[str, Any]:
        """For the results."""
        return {"device": "none, dry run", "dry": True}

    def rates(self) -> tuple[float, float]:
        """Any."""
        return 1e9, 1e9


def _clocked(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
