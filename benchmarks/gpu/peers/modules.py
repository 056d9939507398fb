"""Imports of what may not be there."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.gpu.contender import Absent


def module(*names: str) -> Any:
    """The first of these modules that can be imported.

    Raises:
        Absent: none can; with the reasons.
    """
    reasons = []
    for name in names:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a broken installation raises anything
            reasons.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    raise Absent("; ".join(reasons))
