"""Registration of ``samoyeds::`` operators with `torch.library`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from samoyeds_compile.errors import OperandError

NAMESPACE = "samoyeds"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Kernel = Callable[..., Any]


def define_opaque(schema: str, kernel: Kernel, fake: Kernel, tags: tuple[torch.Tag, ...] = ()) -> None:
    """An operator that tracing does not look into: one kernel for every device, and its shape function.

    The kernel runs with autocast off: casts are decided where the graph is built, not inside a kernel.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, _without_autocast(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)


def define_composite(schema: str, body: Kernel) -> None:
    """An operator that is *defined* by its body: tracing keeps one node before autograd and the body after it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeImplicitAutograd")


def register_autograd(name: str, backward: Kernel, setup_context: Kernel) -> None:
    """Give an opaque operator its derivative."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)


def bad_operand(op: str, operand: str, reason: str, remedy: str) -> OperandError:
    """The error for an operand that does not fit; kernels run often, so its text is made only when it is needed."""
    return OperandError(f"samoyeds::{op}: {operand} {reason}; {remedy}")


def _without_autocast(kernel: Kernel) -> Kernel:
    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._DisableAutocast():
            return kernel(*args, **kwargs)

    return run
