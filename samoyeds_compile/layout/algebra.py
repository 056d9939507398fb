"""What layouts rows can have: row space x major order x element form."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

import torch

from samoyeds_compile.errors import LayoutError

ROWS = ("tokens", "slots")
ORDERS = ("token", "feature")
FORMS = ("plain", "pairs")
_NAME = re.compile(r"(tokens|slots)(?:/(\d+))? (token|feature)-major(?: (pairs))? (\w+)")


@dataclass(frozen=True)
class Layout:
    """How [rows, features] lies in memory.

    Attributes:
        rows: ``tokens``, one row a token, or ``slots``, one row for each (token, expert), sorted by expert.
        pad: the rows of each expert begin at a multiple of it, and rows in between are zero; 1 is ragged. Tokens are
            never padded.
        order: ``token`` (features of a token are contiguous, [rows, features]) or ``feature`` ([features, rows]).
        form: ``plain``, or ``pairs``: two features stand side by side ([features / 2, rows, 2]), as matrix units read
            them; only feature-major.
        dtype: of the elements.

    Raises:
        LayoutError: there is no such layout.
    """

    rows: str = "tokens"
    order: str = "token"
    form: str = "plain"
    pad: int = 1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, value, known in (
            ("rows", self.rows, ROWS),
            ("order", self.order, ORDERS),
            ("form", self.form, FORMS),
        ):
            if value not in known:
                raise LayoutError(f"{name} is {value!r}; pass one of {', '.join(known)}")
        if self.pad < 1 or (self.pad > 1 and self.rows == "tokens"):
            raise LayoutError(f"pad is {self.pad} for {self.rows}; pass 1, or more for slots")
        if self.form == "pairs" and self.order == "token":
            raise LayoutError("form is 'pairs' in token-major order; pairs are feature-major")
        if not self.dtype.is_floating_point:
            raise LayoutError(f"dtype is {self.dtype}; rows are floating")

    @property
    def name(self) -> str:
        """``slots/16 feature-major pairs bfloat16``."""
        pad, form = f"/{self.pad}" if self.pad > 1 else "", " pairs" if self.form == "pairs" else ""
        return f"{self.rows}{pad} {self.order}-major{form} {str(self.dtype).removeprefix('torch.')}"

    @classmethod
    def named(cls, name: str) -> Layout:
        """Inverse of `name`.

        Raises:
            LayoutError: it is the name of none.
        """
        found = _NAME.fullmatch(name)
        dtype = getattr(torch, found[5], None) if found else None
        if found is None or not isinstance(dtype, torch.dtype):
            raise LayoutError(f"{name!r} names no layout; write it as 'slots/16 feature-major pairs bfloat16'")
        return cls(found[1], found[3], found[4] or "plain", int(found[2] or 1), dtype)


class Place(IntEnum):
    """The two binary properties of an edge as one ordered label: rows of slots or not, and feature-major or not.

    Feature-major rows are always slots, as tiles belong to one expert. So of four combinations three remain, and each
    includes the property of the one before: that order is what lets one minimum cut choose both (see `cut`). Padding
    and element form follow from the instructions of the kernel that reads tiles.
    """

    TOKENS = 0
    SLOTS = 1
    TILES = 2

    @property
    def title(self) -> str:
        """For reports."""
        return ("tokens, token-major", "slots, token-major", "slots, feature-major")[self]

    def layout(self, dtype: torch.dtype, matrix_unit: bool) -> Layout:
        """What the CPU kernels have on an edge with this label.

        Args:
            dtype: of the weights.
            matrix_unit: whether tiles are for one.
        """
        if self is Place.TILES and matrix_unit:
            return Layout("slots", "feature", "pairs", 16, dtype)
        if self is Place.TILES:
            return Layout("slots", "feature", pad=16)
        return Layout("tokens" if self is Place.TOKENS else "slots")
