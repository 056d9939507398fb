"""The classes of transformers that run their experts as a Python loop and have no switch to run them otherwise."""

from __future__ import annotations

from torch import nn

from samoyeds_compile.integrations.family import Family
from samoyeds_compile.integrations.jetmoe import JETMOE
from samoyeds_compile.integrations.listed import LISTED
from samoyeds_compile.integrations.stacked import STACKED

FAMILIES: tuple[Family, ...] = (*STACKED, *LISTED, *JETMOE)


def family_of(module: nn.Module) -> Family | None:
    """The entry for a module's class, or for a base whose forward the class has kept."""
    return next((family for family in FAMILIES if _has_forward_of(type(module), family)), None)


def _has_forward_of(cls: type[nn.Module], family: Family) -> bool:
    for base in cls.__mro__:
        if "forward" in vars(base):  # the first one is the forward that runs
            return base.__module__ == family.module and base.__qualname__ == family.name
    return False
