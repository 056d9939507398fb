"""What tables of edits have in common: sizes, what an edit may lead to, and how a piece of source is replaced."""

import inspect
import linecache
from collections.abc import Callable
from typing import Any

E, K, T, H, D = 4, 2, 14, 8, 12
KEPT, EITHER, MIDDLE = "kept", "either", "middle"
Function = Callable[..., Any]


def edited(function: Function, *pieces: str) -> Function:
    """The function with pieces of its source replaced: old, new, and so on."""
    source, name = inspect.getsource(function), f"<{function.__name__}: {pieces[1]}>"
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {function.__name__}"
        source = source.replace(old, new)
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {}
    exec(compile(source, name, "exec"), dict(function.__globals__), namespace)
    return namespace[function.__name__]  # type: ignore[no-any-return]
