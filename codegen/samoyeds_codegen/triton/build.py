"""The text of a kernel as a module: Triton reads the source of a function from its file, so there must be one.

The file is in the user's private cache, named by the hash of its text. What is in it is compared with the text before
it is used, and what does not fit is written again; a file appears whole, by a rename.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType

from samoyeds_codegen.build import cache_directory
from samoyeds_codegen.errors import CacheError, CompilationError
from samoyeds_codegen.files import write_whole


def load_text(name: str, text: str) -> ModuleType:
    """A module of a text, which may come from this package alone.

    Args:
        name: for people.
        text: Python with Triton functions.

    Raises:
        CompilationError: there is no Triton, or it refuses the text.
        CacheError: there is no folder for the file.
    """
    path = _stored(name, text)
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        # The text itself, not what the file holds by now; the file is for Triton to read, and for people.
        exec(compile(text, str(path), "exec"), module.__dict__)
    except Exception as error:  # Triton's own kinds of errors differ between versions
        raise CompilationError(f"{path} is no Triton module here: {type(error).__name__}: {error}") from error
    return module


def _stored(name: str, text: str) -> Path:
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    path = cache_directory() / f"triton-{name}-{digest}.py"
    try:
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
    except OSError as error:
        raise CacheError(f"{path} cannot be written ({error}); set another SAMOYEDS_CACHE_DIR") from error
    return path
