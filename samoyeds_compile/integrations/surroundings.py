"""What surrounds a function in eager mode but not inside the kernel of an operator: autograd, autocast, randomness."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def outside_of_kernel(grad: bool) -> Iterator[None]:
    """Derivatives and version counters for what a kernel calls, which would run below them otherwise."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    key = torch._C.DispatchKey
    for name in (key.AutogradCPU, key.AutogradCUDA, key.AutogradOther, key.ADInplaceOrView):
        exclude = exclude.remove(name)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.set_grad_enabled(grad):
        yield


def autocast_as(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to ``dtype``, or off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators of the host and of ``device``."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextlib.contextmanager
def replaying(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draw the same random numbers as when the state was taken; afterwards all is as before."""
    host = torch.get_rng_state().numel()
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.set_rng_state(state[:host])
        if device.type != "cpu":
            torch.get_device_module(device).set_rng_state(state[host:], device)
        yield
