"""What commands print: tables for people on a terminal, JSON with ``--json``, errors on the other stream."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
"""The option that every command has."""
BAD_INPUT = 2
"""Exit code where the command line, or what it names, is wrong."""


def show(table: RenderableType, data: Any, as_json: bool) -> None:
    """Print one of the two."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        # Piped into a file there is no terminal whose width counts, and long names must not be cut.
        Console(width=None if sys.stdout.isatty() else 160).print(table)


def fail(message: str) -> int:
    """Print an error; returns the exit code."""
    console = Console(stderr=True, soft_wrap=True)
    # No markup and no emoji: `n:m:vector` must stay as it is.
    console.print(f"samoyeds: {message}", style="red", highlight=False, markup=False, emoji=False)
    return BAD_INPUT
