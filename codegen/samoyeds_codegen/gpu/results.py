"""Measured candidates, one file for each device in the user's cache: what was measured once is not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from samoyeds_codegen.build import cache_directory
from samoyeds_codegen.errors import CacheError
from samoyeds_codegen.files import write_whole
from samoyeds_codegen.gpu.candidate import Candidate
from samoyeds_codegen.gpu.cost import Block
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.triton.spec import ExpertsSpec

FORMAT = 1
Results = dict[str, dict[str, float]]
"""Milliseconds by candidate, by block and regime."""


def key(spec: ExpertsSpec, block: Block, slots: int) -> str:
    """What results are kept by; other versions of PyTorch bring other compilers, and are asked anew."""
    return f"{FORMAT} {torch.__version__} {block.experts} {block.hidden} {block.width} {slots} {spec.name}"


def path(device: Device) -> Path:
    """The file of a device.

    Raises:
        CacheError: there is no folder for it.
    """
    name = f"{device.name} {device.capability} {device.processors}"
    return cache_directory("devices") / f"tuned-{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def stored(device: Device) -> Results:
    """All results of a device; none where the file is missing or makes no sense."""
    try:
        found = json.loads(path(device).read_text())
        return {str(k): {str(name): float(ms) for name, ms in v.items()} for k, v in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, CacheError):
        return {}


def of_block(spec: ExpertsSpec, block: Block, device: Device) -> Results:
    """All results of one block, whatever the number of slots."""
    before, after = key(spec, block, 0).split(" 0 ", 1)
    return {k: v for k, v in stored(device).items() if k.startswith(f"{before} ") and k.endswith(f" {after}")}


def fastest(
    spec: ExpertsSpec, block: Block, slots: int, device: Device, among: Iterable[Candidate]
) -> Candidate | None:  # fmt: skip
    """The fastest of these that was measured; None if none was."""
    times = stored(device).get(key(spec, block, slots), {})
    return min((c for c in among if str(c) in times), key=lambda c: times[str(c)], default=None)


def keep(device: Device, new: Mapping[str, Mapping[str, float]]) -> None:
    """Add results.

    Raises:
        CacheError: it cannot be written.
    """
    where = path(device)
    whole = stored(device) | {name: dict(times) for name, times in new.items()}
    try:
        write_whole(where, json.dumps(whole, indent=1))
    except OSError as error:
        raise CacheError(f"{where} cannot be written ({error}); set another SAMOYEDS_CACHE_DIR") from error
