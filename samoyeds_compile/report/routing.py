"""What the report says of routing where it was recorded (option ``record_routing``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingReport:
    """How the router of one block spread slots (a token at one of its experts) over experts.

    Attributes:
        slots: by expert, how many it got in all calls so far.
    """

    slots: list[int]

    @property
    def imbalance(self) -> float | None:
        """Slots of the busiest expert over the mean; None if nothing was counted."""
        slots = self.slots
        return max(slots) * len(slots) / sum(slots) if any(slots) else None

    def __str__(self) -> str:
        """One line."""
        slots = self.slots
        if not any(slots):
            return "nothing counted yet"
        most, none = max(slots), slots.count(0)
        return (
            f"{sum(slots)} slots over {len(slots)} experts, {most} at expert {slots.index(most)}: "
            f"{most * len(slots) / sum(slots):.2f} times the mean; {none or 'no'} expert{'s' * (none != 1)} without any"
        )


class LiveRouting(RoutingReport):
    """The same, read from the tensor that a compiled graph counts in whenever somebody asks.

    Args:
        counts_E: int64, on the device of the block.
    """

    def __init__(self, counts_E: Tensor) -> None:
        self._counts_E = counts_E

    @property
    def slots(self) -> list[int]:
        """By expert; the host waits for the device here, and nowhere else."""
        with torch.no_grad():
            counted: list[int] = self._counts_E.tolist()
        return counted
