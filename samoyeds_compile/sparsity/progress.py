"""The progress bar of what takes long."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def progress_bar(shown: bool) -> Progress:
    """A bar on the error stream, or one that shows nothing."""
    from rich.console import Console  # here, as importing the package must stay light
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=not shown)
