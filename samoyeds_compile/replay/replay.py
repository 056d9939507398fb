"""One region and its replacement, side by side on small inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.graph.extract import Fragment, Step, StepFailed, extract
from samoyeds_compile.match.region import MoERegion
from samoyeds_compile.replay.cases import Case, dimensions_to_try, rounds_of
from samoyeds_compile.replay.compare import deviation, results, tolerance
from samoyeds_compile.replay.inputs import Inputs
from samoyeds_compile.replay.numbers import Dimensions, Numbers, dimensions_of
from samoyeds_compile.replay.replacement import build_replacement, replacement_sizes
from samoyeds_compile.replay.search import Assignment, settle
from samoyeds_compile.replay.surroundings import replaying

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        deviation: of the replacement from the original; None if the original did not run.
        problem: what the original or the replacement raised, if either did.
    """

    deviation: float | None
    problem: str | None = None


class Replay:
    """Compares a region's replacement with the original, one case at a time."""

    def __init__(self, region: MoERegion, fragment: Fragment, needs_grad: bool) -> None:
        self.region, self.fragment, self.needs_grad = region, fragment, needs_grad
        self.prologue = [extract(region.prologue, region.inputs, value) for value in region.computed]
        self.inputs = Inputs(region)
        self.old = dimensions_of(region)
        self.allowed = tolerance(region)
        position = {value: i for i, value in enumerate(region.inputs)}
        last = dict.fromkeys(replacement_sizes(region), len(fragment.steps))
        self.sizes = {**last, **self.inputs.sizes, **fragment.sizes}  # each with the first step that has it
        self.together = [[position[w] for w in p.weights] for p in region.projections if len(p.weights) > 1]
        self.written = {i for i, value in enumerate(region.inputs) if value.superseded is not None}
        self.suits: tuple[int, int] | None = None  # H and I at which the original ran

    def compare(self, case: Case) -> Outcome:
        """Replay one case at the first sizes at which the original runs."""
        outcome = Outcome(None, "it would take too much memory")
        for new in sorted(dimensions_to_try(self.region, self.old, case), key=self._is_new):
            outcome = self._at(case, new)
            if outcome.deviation is not None:
                self.suits = (new.hidden, new.width)
                break
            logger.debug("the original does not replay with %s at %s: %s", case.name, new, outcome.problem)
        return outcome

    def _is_new(self, new: Dimensions) -> bool:
        return (new.hidden, new.width) != self.suits

    def _at(self, case: Case, new: Dimensions) -> Outcome:
        attempts = _Attempts(self, case, new)
        with replaying(self.region.output.context):
            settle(self.sizes, attempts.numbers, attempts.attempt)
        return attempts.outcome


class _Attempts:
    """Runs both programs under one assignment after another; ``outcome`` is the best so far."""

    def __init__(self, replay: Replay, case: Case, new: Dimensions) -> None:
        self.replay, self.case, self.new = replay, case, new
        self.numbers = Numbers(replay.region, replay.old, new)
        self.outcome = Outcome(None)

    def attempt(self, assignment: Assignment) -> int | None:
        """Compare under one assignment.

        Returns:
            The step at which it turned out to be a wrong one, None if all agrees.
        """
        try:
            self._keep(self._compare(assignment))
        except StepFailed as failure:
            self._keep(Outcome(None, str(failure)))
            return failure.step
        agrees = self.outcome.deviation is not None and self.outcome.deviation <= self.replay.allowed
        return None if agrees else len(self.replay.fragment.steps)

    def _keep(self, outcome: Outcome) -> None:
        best = self.outcome.deviation
        if best is None or (outcome.deviation is not None and outcome.deviation < best):
            self.outcome = outcome

    def _compare(self, assignment: Assignment) -> Outcome:
        worst, replacement = 0.0, None
        for round_ in range(rounds_of(self.replay.region, self.case, self.new.rows)):
            inputs = self.replay.inputs.draw(self.case, self.new, assignment.__getitem__, round_)
            expected = self._original(inputs, assignment)
            try:
                replacement = replacement or self._replacement(inputs, assignment)
                worst = max(worst, deviation(self._results(replacement, inputs), expected))
            except Exception as error:  # whatever keeps the rewrite from being checked keeps it from being made
                logger.debug("the replacement of %s raised", self.replay.region.output, exc_info=True)
                return Outcome(float("inf"), f"the rewrite raised {type(error).__name__}: {error}")
        return Outcome(worst)

    def _replacement(self, inputs: list[Any], assignment: Assignment) -> Callable[..., Any]:
        """The replacement as a function of the region's inputs."""
        number_of, region = assignment.__getitem__, self.replay.region

        def computed(given: Sequence[Any]) -> list[Any]:
            return [fragment.run(given, number_of) for fragment in self.replay.prologue]

        with torch.set_grad_enabled(self.replay.needs_grad):
            program = build_replacement(region, [*inputs, *computed(inputs)], number_of)
        return lambda *given: program(*given, *computed(given))

    def _original(self, inputs: list[Any], assignment: Assignment) -> list[Tensor]:
        """Results of the original.

        Raises:
            StepFailed: it does not run at these sizes, or gives a result of another shape.
        """
        fragment = self.replay.fragment
        try:
            expected = self._results(lambda *given: fragment.run(given, assignment.__getitem__, self._allows), inputs)
        except StepFailed:
            raise
        except Exception as error:  # its backward
            raise StepFailed(len(fragment.steps), f"{type(error).__name__}: {error}") from error
        experts = self.replay.region.num_experts if self.replay.region.batched else 1
        if expected[0].numel() != self.new.rows * self.new.hidden * experts:
            raise StepFailed(len(fragment.steps), f"its result has shape {tuple(expected[0].shape)}")
        return expected

    def _results(self, program: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
        return results(program, inputs, self.replay.needs_grad, self.replay.together, self.replay.written)

    def _allows(self, step: Step, result: Any) -> bool:
        """Whether every dimension of a result is one that it may be."""
        if step.shape is None or not isinstance(result, Tensor):
            return True
        return len(step.shape) == result.dim() and all(map(self.numbers.allows, step.shape, result.shape))
