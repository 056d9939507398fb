"""Measure the candidates of a block once, in seconds; see `results` for where the times are kept."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch

from samoyeds_codegen.errors import CacheError
from samoyeds_codegen.gpu.candidate import Candidate, candidates
from samoyeds_codegen.gpu.choose import forget, regime
from samoyeds_codegen.gpu.cost import Block, cost
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.gpu.results import keep, key, stored
from samoyeds_codegen.gpu.trial import Trial
from samoyeds_codegen.triton.spec import ExpertsSpec

logger = logging.getLogger(__name__)
MOST = 6
"""Candidates that are measured for each number of slots: those that the model takes for the fastest."""
ROUNDS = 7
Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


def tune(
    spec: ExpertsSpec,
    block: Block,
    slots: Sequence[int],
    device: torch.device,
    numbers: Device,
    kinds: tuple[str, ...],
    timer: Timer | None = None,
    progress: bool = True,
) -> None:
    """Measure what was not measured on this device before. Whatever goes wrong, the cost model still decides.

    Args:
        spec: the block.
        block: its sizes.
        slots: for which numbers of slots.
        device: where.
        numbers: what the device is.
        kinds: of kernels, which have proven themselves.
        timer: measures a call; None: by CUDA events.
        progress: whether a bar is shown.
    """
    known = stored(numbers)
    regimes = list(dict.fromkeys(regime(s) for s in slots))
    wanted = {r: found for r in regimes if (found := _wanted(spec, block, r, numbers, kinds, known))}
    if not wanted:
        return
    try:
        keep(numbers, _measured(spec, block, wanted, device, timer or by_events, progress))
        forget()
    except (CacheError, torch.OutOfMemoryError) as error:
        logger.warning("candidates are chosen by the cost model: %s", error)


def _wanted(
    spec: ExpertsSpec, block: Block, slots: int, numbers: Device, kinds: tuple[str, ...],
    known: dict[str, dict[str, float]],
) -> list[Candidate]:  # fmt: skip
    """The most promising candidates, if any of them was not measured."""
    every = candidates(spec, kinds, numbers.capability)
    found = sorted(every, key=lambda c: cost(c, spec, block, slots, numbers))[:MOST]
    times = known.get(key(spec, block, slots), {})
    return [] if all(str(c) in times for c in found) else found


def _measured(
    spec: ExpertsSpec, block: Block, wanted: dict[int, list[Candidate]], device: torch.device, timer: Timer,
    progress: bool,
) -> dict[str, dict[str, float]]:  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    trial = Trial(spec, block, device)
    pairs = [(slots, candidate) for slots, each in wanted.items() for candidate in each]
    for slots, candidate in _with_bar(pairs, f"measuring kernels of {spec}") if progress else pairs:
        try:
            ms = timer(trial.call(candidate, slots))
        except Exception as error:  # a candidate that does not run is not taken
            logger.warning("%s was not measured: %s: %s", candidate, type(error).__name__, error)
            continue
        found.setdefault(key(spec, block, slots), {})[str(candidate)] = round(ms, 5)
    return found


def _with_bar(pairs: Sequence[tuple[int, Candidate]], text: str) -> Iterable[tuple[int, Candidate]]:
    from rich.progress import track  # here, as importing this must stay light

    return track(pairs, text)


def by_events(call: Callable[[], object]) -> float:
    """The median of some calls, which follow one another without a wait for the host."""
    for _ in range(2):
        call()
    pairs = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        pairs.append((start, stop))
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(stop) for start, stop in pairs]
    return statistics.median(times)
