"""Files that appear whole: a reader sees all of one or nothing, whatever other processes do."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

UNFINISHED = "making-"
"""How the name of a file or a folder begins as long as nobody may read it."""


def write_whole(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file beside itself and rename it.

    Args:
        path: of the file; its folder exists.
        text: all of it.
        mode: who may read it.

    Raises:
        OSError: it cannot be written; nothing is left over then.
    """
    handle, made = tempfile.mkstemp(dir=path.parent, prefix=UNFINISHED)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(made, mode)
        os.replace(made, path)
    except OSError:
        os.unlink(made)
        raise
