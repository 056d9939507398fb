"""The results file: every finished point is in it, and a later run goes on from there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu.point import KEYS, Row

SAME = ("cpu", "cores", "torch", "commit")
"""What must not change between runs that fill one file."""


class ResumeError(ValueError):
    """A file cannot be gone on with."""


@dataclass
class Results:
    """Rows by their names, the machine and its rooflines; written after each row."""

    path: Path
    machine: dict[str, Any]
    rooflines: dict[str, Any] = field(default_factory=dict)
    rows: dict[tuple[Any, ...], Row] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, machine: Mapping[str, Any], resume: bool) -> Results:
        """Empty, or with the rows of the file.

        Raises:
            ResumeError: the file was made on another machine, by another PyTorch or of other code.
        """
        results = cls(path, dict(machine))
        if resume and path.exists():
            found = json.loads(path.read_text())
            other = [key for key in SAME if found["machine"].get(key) != machine.get(key)]
            if other:
                raise ResumeError(f"{path} was made with another {' and '.join(other)}; measure anew, or elsewhere")
            results.rooflines = found["rooflines"]
            results.rows = {tuple(row[key] for key in KEYS): row for row in found["rows"]}
        return results

    def lacks(self, key: tuple[Any, ...], arms: Sequence[str]) -> bool:
        """Whether a point is to be measured: it is not there, not with these arms, or only with foreign load."""
        row = self.rows.get(key)
        return row is None or not row["rounds"]["quiet"] or not set(arms) <= {*row["ms"], *row["skipped"]}

    def add(self, row: Row) -> None:
        """Take a row, instead of an older one of the same point, and write the file."""
        self.rows[tuple(row[key] for key in KEYS)] = row
        self.write()

    def write(self) -> None:
        """The whole file at once: whoever reads it never sees half of it."""
        content = {"machine": self.machine, "rooflines": self.rooflines, "rows": list(self.rows.values())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".new")
        scratch.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(scratch, self.path)
