"""PyTorch's compiler bisector (``torch._inductor.compiler_bisector``) knows this backend and can switch its steps off.

The bisector puts ``eager``, ``aot_eager`` and ``inductor`` in the place of the backend that `torch.compile` names. If
they are all good it goes on to ``samoyeds``, switches each of `STEPS` off in turn, and finds the block whose step does
the harm. Options have to come from the environment meanwhile, as Inductor refuses ours.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._inductor.compiler_bisector import BACKENDS, BisectSubsystem, CompilerBisector

NAME = "samoyeds"
STEPS = ("samoyeds_routers", "samoyeds_rewrite")
"""Names of the steps, in the order in which they are switched off; each counts the blocks that it is applied to."""


def register() -> None:
    """Make the backend known to the bisector."""
    BACKENDS.setdefault(NAME, [BisectSubsystem(step) for step in STEPS])


def allows(step: str, what: Callable[[], str]) -> bool:
    """Whether a step may be applied once more.

    Args:
        step: one of `STEPS`.
        what: says what it would be applied to, for the bisector's verdict.
    """
    return not CompilerBisector.disable_subsystem(NAME, step, what)
