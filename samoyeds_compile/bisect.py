"""PyTorch's compiler bisector (``torch._inductor.compiler_bisector``) knows this backend and can switch its steps off.

While the bisector tries ``eager``, ``aot_eager`` or ``inductor``, graphs reach that compiler as they came. If they are
all good it goes on to ``samoyeds``, switches each of `STEPS` off in turn, and finds the block whose step does the harm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch._inductor.compiler_bisector import BACKENDS, BisectSubsystem, CompilerBisector

from samoyeds_compile.options import BASES, Options

NAME = "samoyeds"
STEPS = ("samoyeds_routers", "samoyeds_rewrite")
"""Names of the steps, in the order in which they are switched off; each counts the blocks that it is applied to."""


def register() -> None:
    """Make the backend known to the bisector."""
    BACKENDS.setdefault(NAME, [BisectSubsystem(step) for step in STEPS])


def staged(options: Options) -> Options:
    """The options for the stage of a bisection under way; as they are if there is none."""
    stage = CompilerBisector.get_backend() if CompilerBisector.bisection_enabled else None
    if stage is None or stage == NAME:
        return options
    base = stage if stage in BASES else "aot_eager"  # the bisector knows variants of it
    return dataclasses.replace(options, rewrite=False, base=base)


def allows(step: str, what: Callable[[], str]) -> bool:
    """Whether a step may be applied once more.

    Args:
        step: one of `STEPS`.
        what: says what it would be applied to, for the bisector's verdict.
    """
    return not CompilerBisector.disable_subsystem(NAME, step, what)
