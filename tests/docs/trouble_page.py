"""docs/troubleshooting.md, written by what the tools print."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import samoyeds_compile
from samoyeds_compile import Report
from tests.docs.troubles import PROGRAMS, Edits, Trouble

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
HEAD = """\
# Troubleshooting

What goes wrong with blocks of experts, what `explain` says about it, and what to do. `report.why()` gives the text
below; `samoyeds explain` prints the same as a table, and [`report.html`](inspect.md#the-report-in-a-browser) shows the
lines.

```sh
samoyeds explain loop.py:model_and_inputs
```

Each example is one of three programs with a few lines changed. The texts are what the tools print: a test makes this
page (`SAMOYEDS_ACCEPT=1 python -m pytest tests/docs`), and another one sees that what is advised helps.
"""


def edited(text: str, edits: Edits) -> str:
    """The program with every edit made; each must fit once."""
    for old, new in edits:
        assert text.count(old) == 1, (text.count(old), old)
        text = text.replace(old, new)
    return text


def spoilt(trouble: Trouble) -> str:
    """The program that goes wrong."""
    return edited(PROGRAMS[trouble.program], trouble.edits)


def mended(trouble: Trouble) -> str:
    """The program after what the page advises."""
    return PROGRAMS[trouble.program] if trouble.fix is None else edited(spoilt(trouble), trouble.fix)


def explained(text: str, name: str, folder: Path, grad: bool = False) -> Report:
    """What `explain` says of a program."""
    path = folder / name
    path.write_text(text)
    model, inputs = _module(path).model_and_inputs()
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(inputs, dict):
            return samoyeds_compile.explain(model, **inputs)
        return samoyeds_compile.explain(model, inputs)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def environment(trouble: Trouble) -> Iterator[None]:
    """The variables that the example sets, and no other of ours that would change what is said."""
    ours = [name for name in os.environ if name.startswith("SAMOYEDS_") and not name.endswith(("_DIR", "_ACCEPT"))]
    with mock.patch.dict(os.environ, dict(trouble.environment)):
        for name in set(ours) - dict(trouble.environment).keys():
            del os.environ[name]
        yield


def section(trouble: Trouble, folder: Path) -> str:
    """One example as it stands on the page."""
    with environment(trouble):
        report = explained(spoilt(trouble), trouble.program, folder, trouble.grad)
    parts = [
        f"## {trouble.title}\n",
        *_changed(trouble),
        f"```text\n{portable(report.why(), folder)}\n```\n",
        trouble.remarks + "\n",
    ]
    if trouble.fix is not None:
        parts += ["What helps:\n", _difference(trouble.fix)]
    return "\n".join(parts)


def portable(text: str, folder: Path) -> str:
    """Without what differs from machine to machine."""
    text = text.replace(f"{folder}/", "")
    return re.sub(r"[^\s(]*/site-packages/", "", text)


def _changed(trouble: Trouble) -> Iterator[str]:
    for name, value in trouble.environment:
        yield f"`{trouble.program}` with `{name}={value}` in the environment.\n"
    if trouble.grad:
        yield f"`{trouble.program}` outside of `torch.no_grad()`.\n"
    if trouble.edits:
        yield f"In `{trouble.program}`:\n\n{_difference(trouble.edits)}"


def _difference(edits: Edits) -> str:
    lines = []
    for old, new in edits:
        before, after = old.rstrip("\n").split("\n"), new.rstrip("\n").split("\n")
        lines += [f"- {line}" for line in before if line not in after] + [
            f"+ {line}" for line in after if line not in before
        ]
    return "```diff\n" + "\n".join(lines) + "\n```\n"


def page(sections: list[str]) -> str:
    """The whole page."""
    programs = "".join(f"\n### {name}\n\n```py\n{text}```\n" for name, text in PROGRAMS.items())
    return HEAD + "\n" + "\n".join(sections) + "\n## The programs\n" + programs


def written() -> dict[str, str]:
    """The sections of the page as it is, by title."""
    parts = PAGE.read_text(encoding="utf-8").split("\n## ") if PAGE.exists() else []
    return {part.partition("\n")[0]: f"## {part.rstrip()}" for part in parts[1:]}
