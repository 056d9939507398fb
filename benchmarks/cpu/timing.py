"""Rounds of arms in turns, the last-level cache flushed before each call, and what else the machine did meanwhile."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

LEAST, MOST = 5, 40
"""Rounds of a point."""
QUIET = 0.05
"""Share of all cores that others may use in a round, where several threads are timed by the clock on the wall."""


@dataclass(frozen=True)
class Usage:
    """Seconds of processors at one moment: of all processes (and what a hypervisor took), of this one, of a clock."""

    all: float
    own: float
    wall: float

    @classmethod
    def now(cls) -> Usage:
        """Without ``/proc`` others are taken to do nothing."""
        path = Path("/proc/stat")
        fields = path.read_text().partition("\n")[0].split()[1:9] if path.exists() else ["0"] * 8
        user, nice, system, _idle, _waiting, irq, softirq, steal = (int(f) / os.sysconf("SC_CLK_TCK") for f in fields)
        return cls(user + nice + system + irq + softirq + steal, time.process_time(), time.perf_counter())

    def foreign_since(self, before: Usage) -> float:
        """Share of all cores, 0 to 1, that others used."""
        others = (self.all - before.all) - (self.own - before.own)
        return min(max(others / ((self.wall - before.wall) * (os.cpu_count() or 1)), 0.0), 1.0)


@dataclass(frozen=True)
class Round:
    """Milliseconds of each arm, and the share of all cores that others used meanwhile."""

    ms: Mapping[str, float]
    foreign: float


@dataclass(frozen=True)
class Timing:
    """The rounds of one point.

    Attributes:
        rounds: the ones that count.
        measured: how many there were.
        quiet: whether each round that counts had little foreign load, or its time is that of the thread alone.
    """

    rounds: Sequence[Round]
    measured: int
    quiet: bool

    def median(self, arm: str) -> float:
        """Milliseconds."""
        return statistics.median(r.ms[arm] for r in self.rounds)

    def least(self, arm: str) -> float:
        """Milliseconds."""
        return min(r.ms[arm] for r in self.rounds)

    def ratio(self, peer: str, arm: str) -> float:
        """Median over the rounds of the peer's time by the arm's, so that a slow round counts once."""
        return statistics.median(r.ms[peer] / r.ms[arm] for r in self.rounds)

    def summary(self) -> dict[str, Any]:
        """How many rounds count, of how many, their median foreign load, and whether they are to be relied on."""
        foreign = round(statistics.median(r.foreign for r in self.rounds), 3)
        return {"kept": len(self.rounds), "of": self.measured, "foreign": foreign, "quiet": self.quiet}


def measure(
    arms: Mapping[str, Callable[[], object]], threads: int, seconds: float, flush: Callable[[], None]
) -> Timing:
    """`alternate` arms for some seconds, each after a flush; with a call of each before that does not count."""
    for arm in arms.values():
        arm()
    clock = clock_of(threads)
    return alternate({name: partial(_timed, arm, clock, flush) for name, arm in arms.items()}, threads, seconds)


def clock_of(threads: int) -> Callable[[], float]:
    """CPU time of the thread where there is one, which is no longer when neighbours run; else the clock on the wall."""
    return time.thread_time if threads == 1 else time.perf_counter


def alternate(timers: Mapping[str, Callable[[], float]], threads: int, seconds: float) -> Timing:
    """Rounds A B C, C B A, ... of timers, which return milliseconds, for some seconds.

    With several threads, rounds with more than `QUIET` foreign load do not count; while fewer than `LEAST` count, it
    goes on for up to four times as long. If that does not help, the quietest rounds are taken, and the result says so.
    """
    allowed, rounds, start = 1.0 if threads == 1 else QUIET, list[Round](), time.perf_counter()
    while not _enough(rounds, allowed, time.perf_counter() - start, seconds):
        before, names = Usage.now(), list(timers)
        ms = {name: timers[name]() for name in (names if len(rounds) % 2 == 0 else reversed(names))}
        rounds.append(Round(ms, Usage.now().foreign_since(before)))
    kept = [r for r in rounds if r.foreign <= allowed]
    quiet = len(kept) >= LEAST
    return Timing(kept if quiet else sorted(rounds, key=lambda r: r.foreign)[:LEAST], len(rounds), quiet)


def _enough(rounds: Sequence[Round], allowed: float, elapsed: float, seconds: float) -> bool:
    if len(rounds) < LEAST:
        return False
    kept = sum(r.foreign <= allowed for r in rounds)
    return len(rounds) >= MOST or elapsed >= (seconds if kept >= LEAST else 4 * seconds)


def _timed(arm: Callable[[], object], clock: Callable[[], float], flush: Callable[[], None]) -> float:
    flush()
    start = clock()
    arm()
    return (clock() - start) * 1e3
