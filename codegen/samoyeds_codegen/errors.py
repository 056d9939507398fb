"""What can go wrong when kernels are made, one class per cause."""

from __future__ import annotations


class KernelError(Exception):
    """Base of all of them: there is no kernel, and the caller takes another way."""


class UnsupportedSpecError(KernelError, ValueError):
    """No kernel is generated for this specification."""


class CompilerNotFoundError(KernelError, RuntimeError):
    """The machine has no compiler that works."""


class CompilationError(KernelError, RuntimeError):
    """The compiler refused a generated kernel; the message has its command and its output."""


class CacheError(KernelError, RuntimeError):
    """The folder of compiled kernels cannot be used, or is not the user's alone."""
