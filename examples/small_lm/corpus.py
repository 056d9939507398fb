"""Text that every installation has: docstrings of Python's library, torch, numpy, sympy and networkx.

Files are split by a hash of their names, so that what is held out stays so in other versions of a package.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

PACKAGES = ("torch", "numpy", "sympy", "networkx")
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "testing", "_vendor", "idlelib"}
LEAST = 200
"""Characters of the shortest docstring that is taken."""
HELD_OUT = 32
"""One file of so many is held out."""


def held_out() -> list[str]:
    """Text to measure on, one string for each file that has some."""
    return list(_texts(_files(held_out=True), set()))


def training() -> list[str]:
    """Text to train on, without what held-out files have too."""
    seen: set[str] = set()
    for _ in _texts(_files(held_out=True), seen):
        pass
    return list(_texts(_files(held_out=False), seen))


def tokens(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """All text in a row, int64[N]; token 0 stands before each file."""
    ids = [token for encoded in tokenizer.encode_batch(texts) for token in (0, *encoded.ids)]
    return torch.tensor(ids)


def windows(stream_N: Tensor, length: int, count: int) -> Tensor:
    """``count`` windows of the text at equal distances, [count, length]."""
    starts = torch.linspace(0, len(stream_N) - length, count).long()
    return torch.stack([stream_N[start : start + length] for start in starts.tolist()])


def _files(held_out: bool) -> Iterator[Path]:
    for package, root in _roots().items():
        for path in sorted(_sources(root)):
            if _is_held_out(f"{package}/{path.relative_to(root).as_posix()}") == held_out:
                yield path


def _sources(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _roots() -> dict[str, Path]:
    roots = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None, package
        roots[package] = Path(spec.origin).parent
    return roots


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


def _texts(files: Iterable[Path], seen: set[str]) -> Iterator[str]:
    """The docstrings of each file that are not among those seen, to which they are added."""
    for path in files:
        found = [text for text in dict.fromkeys(_docstrings(path)) if text not in seen]
        seen.update(found)
        if found:
            yield "".join(found)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # code of another Python; text that is not UTF-8
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= LEAST:
                yield f"# {getattr(node, 'name', path.stem)}\n{text}\n\n"
