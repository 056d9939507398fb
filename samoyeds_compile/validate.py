"""Translation validation: run a region and its replacement on small random inputs before trusting the rewrite.

The original subgraph is cut out of the user's graph and replayed at small sizes: every expert hit, one expert empty,
one token, tokens in a non-contiguous view, sentinel ids where the block knows them; forward, and backward where
gradients are needed. Nothing of the user's data is read, so the verdict depends on the structure alone, and one verdict
serves every region of the same structure.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from samoyeds_compile.graph.extract import Fragment, extract
from samoyeds_compile.graph.sizes import replace_leaves
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import Carried, Derived, MoERegion
from samoyeds_compile.replay.cases import cases_of
from samoyeds_compile.replay.replay import Replay

logger = logging.getLogger(__name__)

FEWEST_CASES = 3
"""Fewer cases than this are no verdict."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of one validation.

    Attributes:
        problem: what was wrong; None if the rewrite may be made.
        deviation: the largest one seen, infinite if nothing could be compared.
    """

    problem: str | None
    deviation: float


class Validator:
    """Validates regions, each distinct structure once; make one for each graph that is compiled."""

    def __init__(self) -> None:
        self._verdicts: dict[str, Verdict] = {}

    def check(self, region: MoERegion) -> Verdict:
        """The verdict on one region."""
        needs_grad = torch.is_grad_enabled() and region.output.context.grad
        try:
            fragment = extract([*region.prologue, *region.members], region.inputs, region.output)
            key = f"{structure_key(region, fragment)}|grad={needs_grad}"
            if key not in self._verdicts:
                self._verdicts[key] = _validate(region, fragment, needs_grad)
            return self._verdicts[key]
        except Exception as error:  # whatever keeps the rewrite from being checked keeps it from being made
            logger.debug("validation of %s failed", region.output, exc_info=True)
            return Verdict(f"it could not be checked: {type(error).__name__}: {error}", float("inf"))


def structure_key(region: MoERegion, fragment: Fragment) -> str:
    """Text that two regions share if and only if they compute the same with the same shapes and dtypes."""
    values = [*fragment.inputs, *(step.value for step in fragment.steps)]
    number = {value: f"%{i}" for i, value in enumerate(values)}

    def show(argument: Any) -> str:
        return str(replace_leaves(argument, (Value, Derived, Carried), show_one))

    def show_one(argument: Any) -> str:
        if isinstance(argument, Value):
            return number[argument]
        if isinstance(argument, Derived):
            return f"{argument.target}{show((argument.args, argument.kwargs))}"
        return show((argument.source, argument.result, argument.values, argument.externals))

    lines = [_show_input(value) for value in fragment.inputs]
    lines += [f"{step} {step.shape} {step.value.dtype}" for step in fragment.steps]
    lines += [show((p.weights, p.bias, p.transposed, p.compute_dtype)) for p in region.projections]
    operands = (region.x, region.expert_ids, region.expert_weights, region.offsets, region.base, region.output)
    carried = (region.carried_activation, region.carried_post)
    options = (
        region.family, region.top_k, region.num_experts, region.gate is None, region.activation, region.gate_up_layout,
        region.sentinels, region.weighting, region.output.dtype, region.output.context.autocast,
    )  # fmt: skip
    return "\n".join([*lines, show(operands), show(carried), str(options)])


def _show_input(value: Value) -> str:
    if not value.is_tensor:
        return str(value.example)
    return f"{value.dtype}{list(map(str, value.shape))}{value.example.device}"


def _validate(region: MoERegion, fragment: Fragment, needs_grad: bool) -> Verdict:
    replay, worst, compared, obstacle = Replay(region, fragment, needs_grad), 0.0, 0, ""
    for case in cases_of(region):
        outcome = replay.compare(case)
        if outcome.deviation is None:
            obstacle = f"the original block could not be replayed with {case.name}: {outcome.problem}"
            if case.required:
                return Verdict(obstacle, float("inf"))
            continue
        if not outcome.deviation <= replay.allowed:
            problem = outcome.problem or f"the rewrite deviates by {outcome.deviation:.2g}"
            return Verdict(f"{problem} with {case.name}", outcome.deviation)
        worst, compared = max(worst, outcome.deviation), compared + 1
    if compared < FEWEST_CASES:
        return Verdict(f"only {compared} cases could be compared: {obstacle}", float("inf"))
    return Verdict(None, worst)
