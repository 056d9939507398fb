"""Runs a worker for each shape, and another one without a contender that broke the first or hung in it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.shapes import TOKENS, Shape

Event = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
SILENCE = 120.0
"""Seconds without a word after which a worker hangs. Compiling is the longest that one is silent for."""
POLL = 0.2
PASSES = 2
"""Over all shapes: kernels of all are compiled for the first one, which may take its whole share."""
ATTEMPTS = 6
"""Workers for a shape, at most."""


@dataclass
class Outcome:
    """What all workers said."""

    rows: list[Event] = field(default_factory=list)
    notes: list[Event] = field(default_factory=list)


@dataclass
class _Job:
    """What is left of a shape.

    Attributes:
        shape: which.
        tokens: numbers that were not measured.
        excluded: names that broke a worker.
    """

    shape: Shape
    tokens: list[int]
    excluded: list[str] = field(default_factory=list)


Command = Callable[[Shape, Path, float, Sequence[str], Sequence[int]], list[str]]
"""The command line of a worker: shape, file of events, seconds, names that are left out, numbers of tokens."""


def command(shape: Shape, events: Path, seconds: float, excluded: Sequence[str], tokens: Sequence[int]) -> list[str]:
    """`Command` of this benchmark."""
    left_out = [f"--exclude={name}" for name in excluded]
    counts = ["--tokens", *map(str, tokens)]
    words = ["--worker", shape.name, "--events", str(events), "--seconds", str(seconds), *left_out, *counts]
    return [sys.executable, "-m", "benchmarks.gpu", *words]


def measure(
    shapes: Sequence[Shape],
    seconds: float,
    make_command: Command = command,
    tokens: Sequence[int] = TOKENS,
    silence: float = SILENCE,
    heard: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """All shapes within so many seconds; each may use an equal share of what is left, and what others left then.

    Args:
        shapes: in order.
        seconds: for all of them.
        make_command: how a worker is started.
        tokens: numbers of tokens, in order.
        silence: see `SILENCE`.
        heard: called with every event.
    """
    outcome, end = Outcome(), time.monotonic() + seconds
    waiting = [_Job(shape, list(tokens)) for shape in shapes]
    for _ in range(PASSES):
        for number, job in enumerate(waiting):
            share = (end - time.monotonic()) / (len(waiting) - number)
            _work_on(job, time.monotonic() + share, make_command, silence, outcome, heard)
        waiting = [job for job in waiting if job.tokens]
    outcome.notes += [
        {"shape": job.shape.name, "event": "out of time", "tokens": count} for job in waiting for count in job.tokens
    ]
    return outcome


def _work_on(
    job: _Job, end: float, make_command: Command, silence: float, outcome: Outcome, heard: Callable[[Event], None]
) -> None:
    """Leaves those numbers of tokens to the job for which there was no time."""
    shape = job.shape
    for _ in range(ATTEMPTS):
        left = end - time.monotonic()
        if left <= 0 or not job.tokens:
            return
        events, reason = _work(job, left, make_command, silence, heard)
        outcome.rows += [e for e in events if e["event"] == "row"]
        outcome.notes += [{"shape": shape.name, **e} for e in events if e["event"] in NOTED]
        done = {e["tokens"] for e in events if e["event"] == "finished"}
        job.tokens = [t for t in job.tokens if t not in done]
        if reason is None:
            return
        last = next((e for e in reversed(events) if e["event"] in ("trying", "timing")), NOTHING)
        note = {"event": "broke", "name": last.get("name", "rounds"), "tokens": last["tokens"], "reason": reason}
        outcome.notes.append({"shape": shape.name, **note})
        outcome.rows = [r for r in outcome.rows if r["shape"] != shape.name or r["tokens"] not in job.tokens]
        if last is NOTHING:
            job.tokens = []
        elif last["event"] == "timing":  # all have run alone; nobody knows which broke in company
            job.tokens.remove(last["tokens"])
        else:
            job.excluded.append(last["name"])


NOTHING: Event = {"name": "start", "tokens": None}
"""A worker that ended before it tried anything."""
NOTED = ("absent", "failed", "no graph")


def _work(
    job: _Job, seconds: float, make_command: Command, silence: float, heard: Callable[[Event], None]
) -> tuple[list[Event], str | None]:
    """What one worker said, and how it ended if not well."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "events", Path(folder) / "log"
        path.touch()
        words = make_command(job.shape, path, seconds, job.excluded, job.tokens)
        with log.open("w") as output:
            process = subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=output)
        events: list[Event] = []
        reason = _follow(process, path, events, seconds + silence, silence, heard)
        if reason == "":
            lines = log.read_text(errors="replace").strip().splitlines()
            reason = f"exit status {process.returncode}: {' | '.join(lines[-3:])[-400:]}"
        return events, reason


def _follow(
    process: subprocess.Popen[bytes], path: Path, events: list[Event], limit: float, silence: float,
    heard: Callable[[Event], None],
) -> str | None:  # fmt: skip
    """Read events until the process ends; None if it ended well, a reason, or nothing if its log has it."""
    end, spoke = time.monotonic() + limit, time.monotonic()
    with path.open() as stream:
        while True:
            ended = process.poll() is not None
            for line in iter(stream.readline, ""):
                events.append(json.loads(line))
                heard(events[-1])
                spoke = time.monotonic()
            if ended:
                return None if process.returncode == 0 else ""
            if time.monotonic() - spoke > silence or time.monotonic() > end:
                process.kill()
                process.wait()
                return f"no word for {time.monotonic() - spoke:.0f} s"
            time.sleep(POLL)
