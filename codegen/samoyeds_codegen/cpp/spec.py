"""What a C++ kernel computes: pure data, hashable and printable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from samoyeds_codegen import expr
from samoyeds_codegen.cpp.activation import to_cpp
from samoyeds_codegen.cpp.layouts import Layouts
from samoyeds_codegen.errors import UnsupportedSpecError

DTYPES = ("float32", "bfloat16")
PATTERNS = ((1, 1), (1, 2), (2, 4))
VECTORS = (16, 32, 64, 128)
PRODUCTS = ("linear", "outer")
STRIP = 16
"""Condensed rows that lie side by side in strips."""


def strip_rows(n: int, m: int) -> int:
    """Output rows of a strip, whose condensed rows keep n sub-rows of each m."""
    return STRIP * m // n


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise UnsupportedSpecError(reason)


def _check(dtype: str, activation: str, gated: bool) -> None:
    """What all specifications have in common."""
    _require(dtype in DTYPES, f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    offered = set(expr.GATED_NAMES) if gated else {expr.PLAIN_NAME}
    _require(expr.names(activation) <= offered, f"activation {activation!r} reads other names")
    to_cpp(activation)
    rounds = dtype == "float32" and "'bfloat16'" in activation
    _require(not rounds, "the activation rounds to bfloat16, which sums in another order than PyTorch's tip over")


@dataclass(frozen=True)
class ExpertsSpec:
    """Experts with packed weights, the whole block: route, gate and up, activation, down, weighted sum.

    Attributes:
        dtype: of weights, rows and biases; everything is summed in float32.
        n, m, vector, group: the pattern, with 2:4 inside kept sub-rows (see ``SparsityConfig``).
        activation: an expression of `samoyeds_codegen.expr`.
        gated: whether there is a gate, so that the expression reads ``gate`` and ``up``, not ``x``.
        strips: whether storage lies in strips (`samoyeds_compile.sparsity.strips`); else it is canonical, row by row.
        layouts: of the edges inside.

    Raises:
        UnsupportedSpecError: there is no kernel for it.
    """

    dtype: str
    n: int
    m: int
    vector: int
    group: int
    activation: str
    gated: bool
    strips: bool = False
    layouts: Layouts = field(default_factory=Layouts)

    def __post_init__(self) -> None:
        _check(self.dtype, self.activation, self.gated)
        patterns = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
        _require((self.n, self.m) in PATTERNS, f"pattern {self.n}:{self.m} is not one of {patterns}")
        _require(self.vector in VECTORS, f"vectors of {self.vector} columns are not among {VECTORS}")

    @property
    def name(self) -> str:
        """What ops call the kernel; one short text, as each argument of an op takes time in each call."""
        form, order = "gated" if self.gated else "plain", "strips" if self.strips else "rows"
        pattern = f"{self.n} {self.m} {self.vector} {self.group} {order}"
        return f"{self.dtype} {self.layouts.name} {pattern} {form} {self.activation}"

    @classmethod
    def named(cls, name: str) -> ExpertsSpec:
        """Inverse of `name`."""
        dtype, layouts, n, m, vector, group, order, form, activation = name.split(" ", 8)
        pattern = int(n), int(m), int(vector), int(group)
        return cls(dtype, *pattern, activation, form == "gated", order == "strips", Layouts.named(layouts))

    def __str__(self) -> str:
        """One line for reports."""
        group = f"/{self.group}" if self.group != 1 else ""
        order = " in strips" if self.strips else ""
        return f"{self.dtype} {self.n}:{self.m}:{self.vector}+2:4{group} {expr.display_name(self.activation)}{order}"


@dataclass(frozen=True)
class DenseExpertsSpec:
    """The same with dense weights.

    Attributes:
        dtype: of weights, rows and biases; everything is summed in float32.
        activation: an expression of `samoyeds_codegen.expr`.
        gated: whether there is a gate, so that the expression reads ``gate`` and ``up``, not ``x``.
        by_columns: whether weights of one input are contiguous, as in stacks [E, in, out]; else those of one output.
        layouts: of the edges inside.

    Raises:
        UnsupportedSpecError: there is no kernel for it.
    """

    dtype: str
    activation: str
    gated: bool
    by_columns: bool = False
    layouts: Layouts = field(default_factory=Layouts)

    def __post_init__(self) -> None:
        _check(self.dtype, self.activation, self.gated)

    def __str__(self) -> str:
        """One line for reports."""
        return f"{self.dtype} {expr.display_name(self.activation)}{' by columns' if self.by_columns else ''}"

    @property
    def name(self) -> str:
        """What ops call the kernel."""
        order, form = "columns" if self.by_columns else "rows", "gated" if self.gated else "plain"
        return f"{self.dtype} {self.layouts.name} {order} {form} {self.activation}"

    @classmethod
    def named(cls, name: str) -> DenseExpertsSpec:
        """Inverse of `name`."""
        dtype, layouts, order, form, activation = name.split(" ", 4)
        return cls(dtype, activation, form == "gated", order == "columns", Layouts.named(layouts))


@dataclass(frozen=True)
class ProductSpec:
    """One product of all experts with dense weights, as training computes them one by one.

    Attributes:
        dtype: of all operands; everything is summed in float32.
        product: ``linear`` multiplies rows with the matrix of their expert, ``outer`` rows with rows (its derivative).
        by_columns: whether weights of one input are contiguous; else those of one output. Always for ``outer``, where
            an input is a slot.

    Raises:
        UnsupportedSpecError: there is no kernel for it.
    """

    dtype: str
    product: str
    by_columns: bool

    activation: ClassVar[str] = expr.PLAIN_NAME
    gated: ClassVar[bool] = False
    layouts: ClassVar[Layouts] = Layouts(by_rows="h")

    def __post_init__(self) -> None:
        _check(self.dtype, self.activation, self.gated)
        _require(self.product in PRODUCTS, f"product {self.product!r} is not one of {', '.join(PRODUCTS)}")
        _require(self.by_columns or self.product != "outer", "an outer product reads its rows by columns")

    def __str__(self) -> str:
        """One line for reports."""
        return f"{self.dtype} {self.product}{' by columns' if self.by_columns else ''}"
