"""How packed weights lie in memory: one record for 64 condensed rows and 128 dense columns.

A record is what a kernel copies at a time, and what one bulk copy moves:

- values, 8 KiB: 4 steps of 32 columns, each 8 groups of 8 rows, each two matrices of 8 rows x 8 kept values, 128
  bytes. So ``ldmatrix`` reads the fragments of ``mma.sp``, and ``wgmma.sp`` its first operand without a swizzle (PTX
  ISA, "Matrix descriptor": core matrices of 8 x 16 bytes): both share the weights;
- metadata, 1 KiB: for each slab of 16 rows and each lane two words, for steps 0, 1 and steps 2, 3. Even steps are read
  from lanes 0 and 1 of each quad (selector 0), odd ones from lanes 2 and 3 (selector 1). The low half of a word is row
  lane / 4, the high half row lane / 4 + 8;
- which sub-row each row is (not for 1:1), 64 bytes: for each row a byte, with a code for every vector of the columns.

Offsets are sympy expressions: `emit` prints them as CUDA, tests evaluate them in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.printing.c import C99CodePrinter

ROWS, COLUMNS = 64, 128
"""Condensed rows and dense columns of a record."""
SLAB_ROWS, STEP_COLUMNS = 16, 32
"""Rows of a warp's matrix product, and its columns."""
STEPS = COLUMNS // STEP_COLUMNS
VALUE_BYTES, METADATA_BYTES, SELECTION_BYTES = ROWS * COLUMNS, 1024, ROWS


def _symbols(names: str) -> tuple[sympy.Symbol, ...]:
    return tuple(sympy.Symbol(name, integer=True, nonnegative=True) for name in names.split())


@dataclass(frozen=True)
class Offset:
    """Where something is in a record, in bytes, as a function of whole numbers."""

    name: str
    arguments: tuple[sympy.Symbol, ...]
    expression: sympy.Expr

    def __call__(self, *values: int) -> int:
        """The offset at these numbers."""
        return int(self.expression.subs(dict(zip(self.arguments, values, strict=True))))

    def to_cuda(self) -> str:
        """The offset as a function of CUDA."""
        arguments = ", ".join(f"int {a}" for a in self.arguments)
        return f"DEVICE int {self.name}({arguments}) {{\n  return {_Printer().doprint(self.expression)};\n}}"


class _Printer(C99CodePrinter):
    """Whole numbers: division rounds down and numbers are not made floats."""

    def _print_floor(self, expression: sympy.floor) -> str:
        numerator, denominator = sympy.fraction(expression.args[0])
        return f"(({self._print(numerator)}) / ({self._print(denominator)}))"

    def _print_Mod(self, expression: sympy.Mod) -> str:
        left, right = map(self._print, expression.args)
        return f"(({left}) % ({right}))"


_row, _half, _step, _slab, _lane = _symbols("row half step slab lane")

VALUE = Offset(
    "value_offset",
    (_row, _half, _step),
    STEP_COLUMNS * ROWS * _step + 256 * sympy.floor(_row / 8) + 128 * _half + 16 * sympy.Mod(_row, 8),
)
"""Of 8 kept values of a row: the first (``half`` 0) or second 16 dense columns of a step."""
METADATA = Offset("metadata_offset", (_slab, _lane), VALUE_BYTES + 256 * _slab + 8 * _lane)
"""Of a lane's two words of metadata."""
SELECTION_AT = VALUE_BYTES + METADATA_BYTES


def record_bytes(selects: bool) -> int:
    """Bytes of a record, a multiple of 16 as all copies want; ``selects`` if sub-rows are chosen, n < m."""
    return SELECTION_AT + (SELECTION_BYTES if selects else 0)
