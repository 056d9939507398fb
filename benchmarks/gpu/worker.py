"""One shape in a process of its own: a kernel that breaks the device's context, or hangs, takes nothing else along.

What happens is said as it happens, so the process that waits knows what was under way when it ended.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.contender import Absent, Bind, Call, Chosen, Contender
from benchmarks.gpu.inputs import Inputs, error, expected, make_inputs
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.rows import row_of
from benchmarks.gpu.shapes import Shape
from benchmarks.gpu.weights import Weights, make

Say = Callable[[Mapping[str, Any]], None]
MOST_GRAPHED = 1024
"""Tokens up to which calls are captured in graphs: each has memory of its own, and longer calls hide their launches."""
SECONDS = 0.12
"""Of timing for each contender and number of tokens."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative to the norm: rows are rounded between the projections, and by some before they are summed."""


class BrokenDevice(Exception):
    """The device does not answer any more: this process can do nothing else."""


@dataclass
class Running:
    """A contender that is bound to tokens."""

    contender: Contender
    call: Call
    timed: Callable[[], Any]
    error: float | None
    graph: bool


@dataclass
class Worker:
    """Measures a shape.

    Attributes:
        machine: where.
        shape: what.
        dtype: of weights and tokens.
        say: tells the process that waits.
        deadline: by `time.monotonic`.
        excluded: names that are left out, as they broke a process before.
    """

    machine: Machine
    shape: Shape
    dtype: torch.dtype
    say: Say
    deadline: float
    excluded: frozenset[str] = frozenset()
    weights: dict[str, Weights] = field(default_factory=dict)

    def run(self, contenders: Sequence[Contender], tokens: Sequence[int]) -> None:
        """All numbers of tokens, as long as there is time.

        Raises:
            BrokenDevice: a contender broke the device; what was said last names it.
        """
        bound = {c.name: (c, bind) for c in contenders if (bind := self._prepare(c)) is not None}
        for count in tokens:
            if time.monotonic() > self.deadline:
                self.say({"event": "out of time", "tokens": count})
                continue
            self._measure(list(bound.values()), count)
            self.say({"event": "finished", "tokens": count})
            self.machine.release()

    def _prepare(self, contender: Contender) -> Bind | None:
        if contender.name in self.excluded:
            return None

        def prepare() -> Bind:
            if contender.form not in self.weights:
                self.weights[contender.form] = make(contender.form, self.shape, self.dtype, self.machine.device)
            return contender.prepare(self.shape, self.weights[contender.form])

        return self._attempt(contender, None, prepare)

    def _measure(self, bound: Sequence[tuple[Contender, Bind]], count: int) -> None:
        inputs = make_inputs(self.shape, count, self.dtype, self.machine.device)
        wanted = {form: expected(weights, inputs) for form, weights in self.weights.items()}
        running = []
        for contender, bind in bound:
            start = functools.partial(self._start, contender, bind, inputs, wanted)
            found = self._attempt(contender, count, start)
            if found is not None:
                running.append(found)
        self.say({"event": "timing", "tokens": count})
        calls = {r.contender.name: r.timed for r in running}
        times = self.machine.alternate(calls, SECONDS * len(running))
        for each in running:
            peak = self._attempt(each.contender, count, functools.partial(self.machine.peak, each.call))
            weights = self.weights[each.contender.form]
            row = row_of(self.shape, weights, inputs, each.contender, times[each.contender.name], peak or 0)
            self.say({"event": "row", **row, **_choice(each.call), "error": each.error, "graph": each.graph})

    def _start(self, contender: Contender, bind: Bind, inputs: Inputs, wanted: Mapping[str, Any]) -> Running:
        """Bind, run once, compare, and capture where that is possible.

        Raises:
            ArithmeticError: the result is wrong.
        """
        call = bind(inputs)
        out, found = call(), None
        self.machine.synchronize()
        if contender.checked and out is not None:
            found = error(out, wanted[contender.form])
            if not found <= TOLERANCE[self.dtype]:
                raise ArithmeticError(f"relative error {found:.3g}")
        timed, graph = self._captured(contender, call, inputs)
        return Running(contender, call, timed, found, graph)

    def _captured(self, contender: Contender, call: Call, inputs: Inputs) -> tuple[Callable[[], Any], bool]:
        tokens = inputs.x_TH.shape[0]
        if not contender.graph or tokens > MOST_GRAPHED:
            return call, False
        try:
            return self.machine.captured(call), True
        except Exception as error:  # whatever a library does that no graph can hold
            self.machine.synchronize()
            self.say({"event": "no graph", "name": contender.name, "tokens": tokens, "reason": _text(error)})
            return call, False

    def _attempt(self, contender: Contender, tokens: int | None, action: Callable[[], Any]) -> Any:
        """What the action gives; None if it failed, and said so.

        Raises:
            BrokenDevice: the device does not answer since.
        """
        where = {"name": contender.name, "tokens": tokens}
        self.say({"event": "trying", **where})
        try:
            return action()
        except Absent as reason:
            self.say({"event": "absent", **where, "reason": str(reason)})
        except Exception as error:  # a peer's or a kernel's own; the run goes on without it
            self.say({"event": "failed", **where, "reason": _text(error)})
            self._still_there()
        return None

    def _still_there(self) -> None:
        self.machine.release()
        try:
            self.machine.synchronize()
            torch.zeros(1, device=self.machine.device).add_(1).item()
        except Exception as error:
            raise BrokenDevice(_text(error)) from error


def _choice(call: Call) -> dict[str, Any]:
    """What a call of ours takes, and how long by the cost model; nothing is known of others."""
    return {"candidate": call.candidate, "model_ms": call.model_ms} if isinstance(call, Chosen) else {}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"
