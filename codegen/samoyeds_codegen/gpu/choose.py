"""The candidate for a call: the one that was measured to be fastest here, or the one that the model takes for it."""

from __future__ import annotations

import functools

from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.gpu.candidate import KINDS, Candidate, candidates, too_many
from samoyeds_codegen.gpu.cost import Block, cost
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.gpu.results import fastest
from samoyeds_codegen.triton.spec import ExpertsSpec

TUNED = "tuned"
"""Stands among the names of kinds where measured results decide, as far as there are some."""


def regime(slots: int) -> int:
    """The next power of two: calls of about as many slots share a choice."""
    return 1 << max(slots - 1, 0).bit_length()


def choose(spec: ExpertsSpec, block: Block, slots: int, device: Device, kinds: str) -> Candidate:
    """The candidate for S slots; all that it depends on is known on the host.

    Args:
        spec: the block.
        block: its sizes.
        slots: S.
        device: where it runs.
        kinds: names of `KINDS` that may be taken, and `TUNED`, separated by spaces.

    Raises:
        UnsupportedSpecError: none of these has a kernel for the block on the device.
    """
    return _chosen(spec, block, regime(slots), device, kinds)


@functools.lru_cache(maxsize=4096)
def _chosen(spec: ExpertsSpec, block: Block, slots: int, device: Device, kinds: str) -> Candidate:
    words = kinds.split()
    allowed = tuple(kind for kind in KINDS if kind in words and not too_many(kind, block.experts))
    found = candidates(spec, allowed, device.capability)
    if not found:
        whole = f"{spec} of {block.experts} experts on {device.name}"
        raise UnsupportedSpecError(f"kernels of kind {kinds} do not compute {whole}; name other kinds")
    measured = fastest(spec, block, slots, device, found) if TUNED in words else None
    return measured or min(found, key=lambda c: (cost(c, spec, block, slots, device), c.slots))


def forget() -> None:
    """Choose anew, as there are other results now."""
    _chosen.cache_clear()
