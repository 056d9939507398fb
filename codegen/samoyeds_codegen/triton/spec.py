"""What a Triton kernel computes: pure data, hashable and printable."""

from __future__ import annotations

from dataclasses import dataclass

from samoyeds_codegen import expr
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.triton.activation import to_triton

DTYPES = ("float32", "bfloat16", "float16")
PATTERNS = ((1, 1), (1, 2), (2, 4))
VECTORS = (16, 32, 64, 128)
OPS = ("up", "down", "back")
SEPARATE = "-matrices"
"""Ends the word of a name that says whether there is a gate."""
LEAST_TILE = 16
"""No side of a product in Triton may be smaller."""


def _require(holds: bool, reason: str) -> None:
    if not holds:
        raise UnsupportedSpecError(reason)


@dataclass(frozen=True)
class Pattern:
    """A two-level pattern of packed weights (see ``SparsityConfig``), with 2:4 inside of kept sub-rows.

    Attributes:
        n, m: sub-rows kept of a block of m.
        vector: columns that share a choice of sub-rows.
        group: blocks of rows that share a choice.

    Raises:
        UnsupportedSpecError: no kernel reads it.
    """

    n: int
    m: int
    vector: int
    group: int = 1

    def __post_init__(self) -> None:
        patterns = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
        _require((self.n, self.m) in PATTERNS, f"pattern {self.n}:{self.m} is not one of {patterns}")
        _require(self.vector in VECTORS, f"vectors of {self.vector} columns are not among {VECTORS}")
        _require(self.group >= 1, f"{self.group} blocks cannot share a choice")

    @property
    def selects(self) -> bool:
        """Whether there is a choice of sub-rows."""
        return self.n < self.m

    def __str__(self) -> str:
        """As ``SparsityConfig`` prints it."""
        return f"{self.n}:{self.m}:{self.vector}+2:4" + (f"/{self.group}" if self.group != 1 else "")


@dataclass(frozen=True)
class ExpertsSpec:
    """Experts, the whole block: gate and up, activation, down, weighted sum.

    Attributes:
        dtype: of weights and rows; products are summed in float32.
        pattern: of packed weights; None if they are dense.
        activation: an expression of `samoyeds_codegen.expr`, computed in float32.
        gated: whether there is a gate, so that the expression reads ``gate`` and ``up``, not ``x``.
        separate: whether every expert has matrices of its own, which lie anywhere; else weights are stacks.

    Raises:
        UnsupportedSpecError: there is no kernel for it.
        ExpressionError: the activation is no expression.
    """

    dtype: str
    pattern: Pattern | None
    activation: str
    gated: bool
    separate: bool = False

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        offered = set(expr.GATED_NAMES) if self.gated else {expr.PLAIN_NAME}
        _require(expr.names(self.activation) <= offered, f"activation {self.activation!r} reads other names")
        to_triton(self.activation)
        rounds = self.dtype == "float32" and any(f"'{low}'" in self.activation for low in ("bfloat16", "float16"))
        _require(not rounds, "the activation rounds, which sums in another order than PyTorch's tip over")

    @property
    def name(self) -> str:
        """What ops call it: one text."""
        p = self.pattern
        pattern = "dense" if p is None else f"{p.n}:{p.m}:{p.vector}:{p.group}"
        form = f"{'gated' if self.gated else 'plain'}{SEPARATE if self.separate else ''}"
        return f"{self.dtype} {pattern} {form} {self.activation}"

    @classmethod
    def named(cls, name: str) -> ExpertsSpec:
        """Inverse of `name`."""
        dtype, pattern, form, activation = name.split(" ", 3)
        found = None if pattern == "dense" else Pattern(*map(int, pattern.split(":")))
        gated, separate = form.removesuffix(SEPARATE) == "gated", form.endswith(SEPARATE)
        return cls(dtype, found, activation, gated, separate)

    def __str__(self) -> str:
        """One line for reports."""
        pattern = f"{self.pattern or 'dense'}{' matrices' if self.separate else ''}"
        return f"{self.dtype} {pattern} {expr.display_name(self.activation)}"


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with how much of the machine.

    Attributes:
        rows: rows of the weight as it is stored, so condensed rows of a packed one.
        slots: slots of one expert.
        cols: columns of a step of the sum.
        warps: of 32 threads.
        stages: steps that are loaded ahead, and one.
    """

    rows: int
    slots: int
    cols: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for size in (self.rows, self.slots, self.cols):
            _require(
                size >= LEAST_TILE and size & (size - 1) == 0, f"a side of {self} is no power of two of 16 or more"
            )

    def __str__(self) -> str:
        """``64x16x128 w4 s3``: rows, slots, columns, warps, stages."""
        return f"{self.rows}x{self.slots}x{self.cols} w{self.warps} s{self.stages}"


@dataclass(frozen=True)
class KernelSpec:
    """One kernel: a projection of all experts over their slots.

    ``up`` gathers the tokens of the slots, multiplies by gate and up and activates; ``down`` reads rows in slot order.
    ``back``, of packed weights, multiplies rows of tokens or of slots by the weight itself, not by its transpose: the
    gradient of what was projected. Dense weights have that from the others, by strides.
    Where gate and up lie (concatenated, interleaved, apart), and which dimension of a dense weight is contiguous, is no
    part of it: a kernel takes pointers and strides of both, and Triton specialises on strides of 1.

    Attributes:
        op: ``up``, ``down`` or ``back``.
        experts: whose.
        tile: the tile.

    Raises:
        UnsupportedSpecError: there is no such kernel.
    """

    op: str
    experts: ExpertsSpec
    tile: Tile

    def __post_init__(self) -> None:
        _require(self.op in OPS, f"{self.op} is not one of {', '.join(OPS)}")
        pattern = self.experts.pattern
        _require(self.op != "back" or pattern is not None, "dense weights go back by strides")
        if pattern is not None and pattern.selects:
            fits = self.tile.cols <= pattern.vector
            _require(fits, f"{self.tile.cols} columns span several vectors of {pattern.vector}")

    @property
    def outputs(self) -> int:
        """Features of the result that a program computes: columns of the tile, or rows, which may be condensed."""
        pattern = self.experts.pattern
        if self.op == "back":
            return self.tile.cols
        return self.tile.rows if pattern is None else self.tile.rows // pattern.n * pattern.m

    @property
    def sides(self) -> tuple[str, ...]:
        """The weights that it multiplies by."""
        if self.op in ("down", "back"):
            return (self.op,)
        return expr.GATED_NAMES if self.experts.gated else ("up",)

    def __str__(self) -> str:
        """One line for reports and the head of the text."""
        return f"{self.op} {self.experts}, tile {self.tile}"
