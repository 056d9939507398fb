"""The command ``samoyeds``: one file a command."""

from samoyeds_compile.cli.app import main

__all__ = ["main"]
