"""Index arithmetic: sympy formulas of whole numbers as text that Python, Triton and C read alike."""

from __future__ import annotations

import sympy
from sympy.printing.str import StrPrinter

from samoyeds_codegen.triton.spec import Pattern


def selection_row(pattern: Pattern, row: str, first_block: str) -> str:
    """The row of ``selection`` that a condensed row reads.

    Condensed rows come n to a block and ``group`` blocks share n rows of ``selection``; the weight may begin at block
    ``first_block`` of what the selection is of (an up projection behind its gate).
    """
    r, first = sympy.symbols(f"{row} {first_block}", integer=True, nonnegative=True)
    block = sympy.floor(r / pattern.n) + first
    return show(sympy.floor(block / pattern.group) * pattern.n + sympy.Mod(r, pattern.n))


def block_row(pattern: Pattern, row: str) -> str:
    """The output feature with which the block of a condensed row begins."""
    r = sympy.Symbol(row, integer=True, nonnegative=True)
    return show(sympy.floor(r / pattern.n) * pattern.m)


def stored_rows(pattern: Pattern | None, rows: str) -> str:
    """How many rows are stored of ``rows`` output features: whole blocks of condensed rows, if packed."""
    count = sympy.Symbol(rows, integer=True, nonnegative=True)
    if pattern is None:
        return show(count)
    return show(sympy.floor((count + pattern.m - 1) / pattern.m) * pattern.n)


def show(formula: sympy.Expr) -> str:
    """The text of a formula of whole numbers."""
    return str(_Printer().doprint(formula))


class _Printer(StrPrinter):
    """Floors of fractions as ``//``."""

    def _print_floor(self, formula: sympy.Expr) -> str:
        numerator, denominator = sympy.fraction(sympy.together(formula.args[0]))
        return f"(({self._print(numerator)}) // {self._print(denominator)})"

    def _print_Mod(self, formula: sympy.Expr) -> str:
        left, right = formula.args
        return f"({self._print(left)} % {self._print(right)})"
