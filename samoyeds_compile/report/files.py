"""Files of the dump folder: each is written in one go, and processes that share a folder never clash."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

from samoyeds_codegen.files import write_whole
from samoyeds_compile.errors import OptionError

LARGEST_FILE = 8 * 2**20
"""Bytes of one file, at most; a longer text is left out."""
LARGEST_FOLDER = 256 * 2**20
"""Bytes of a folder beyond which further graphs leave only their report."""


def write(path: Path, text: str) -> None:
    """Write a file that anybody may read; a reader sees all of it or nothing."""
    write_whole(path, text, mode=0o644)


def fresh_folder(root: Path) -> Path:
    """A new folder ``graph_NNN`` in ``root``; no two processes get the same.

    Raises:
        OptionError: it cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            folder = root / f"graph_{number:03d}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        remedy = "give a folder that can be created and written to"
        raise OptionError(f"option 'dump' is {str(root)!r}, which does not work ({error}); {remedy}") from error
    raise AssertionError("unreachable")


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
