"""How a piece of packed weights lies in shared memory: 64 condensed rows and 128 dense columns.

Copies of 16 and 4 bytes bring canonical storage (see ``PackedWeight``) there, so weights lie in memory once:

- values, 8 KiB: 4 steps of 32 columns, each 8 groups of 8 rows, each two matrices of 8 rows x 8 kept values, 128
  bytes. So ``ldmatrix`` reads the fragments of ``mma.sp``, and ``wgmma.sp`` its first operand without a swizzle (PTX
  ISA, "Matrix descriptor": core matrices of 8 x 16 bytes);
- metadata, 1 KiB: 16 bytes for each row, two for every 16 columns. A lane makes a word of two of them: the low half is
  of row lane / 4 of a slab of 16, the high half of row lane / 4 + 8. Even steps are read from lanes 0 and 1 of each
  quad (selector 0), odd ones from lanes 2 and 3 (selector 1), so lane q has 16 columns q and 4 + q of a row.

Offsets are sympy expressions: `emit` prints them as CUDA, tests evaluate them in Python.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.printing.c import C99CodePrinter

ROWS, COLUMNS = 64, 128
"""Condensed rows and dense columns of a piece."""
SLAB_ROWS, STEP_COLUMNS = 16, 32
"""Rows of a warp's matrix product, and its columns."""
STEPS = COLUMNS // STEP_COLUMNS
VALUE_BYTES, METADATA_BYTES = ROWS * COLUMNS, 1024
PIECE_BYTES = VALUE_BYTES + METADATA_BYTES


def _symbols(names: str) -> tuple[sympy.Symbol, ...]:
    return tuple(sympy.Symbol(name, integer=True, nonnegative=True) for name in names.split())


@dataclass(frozen=True)
class Offset:
    """Where something is in a piece, in bytes, as a function of whole numbers."""

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


_row, _half, _step, _sixteen = _symbols("row half step sixteen")

VALUE = Offset(
    "value_offset",
    (_row, _half, _step),
    STEP_COLUMNS * ROWS * _step + 256 * sympy.floor(_row / 8) + 128 * _half + 16 * sympy.Mod(_row, 8),
)
"""Of 8 kept values of a row: the first (``half`` 0) or second 16 dense columns of a step."""
METADATA = Offset("metadata_offset", (_row, _sixteen), 16 * _row + 2 * _sixteen)
"""Of the metadata of 16 columns of a row, behind the values."""
