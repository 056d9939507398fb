"""Which layouts each op reads and writes, on which target, and what that costs; a declaration is one small class.

Costs are sympy expressions in T, H, I, E, K, the sizes of elements and the constants of the machine (`machine`), in
picoseconds. `ACTIVE`, the expected number of experts that get a token, and so `PER_EXPERT`, are closed forms.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import sympy
from sympy import Expr, Max, ceiling

from samoyeds_compile.layout.algebra import Place

T, H, I, E, K = sympy.symbols("T H I E K", positive=True)  # noqa: E741 (the names of the design)
GATED, SIZE, TILE_SIZE = sympy.symbols("gated size tile_size", positive=True)
"""1 or 2 matrices before the activation; bytes of an element of rows that come in, and of one in a tile."""
MOVE, TURN, LANES = sympy.symbols("move turn lanes", positive=True)
ROWS_READ, ROWS_STEP, ROWS_MAC = sympy.symbols("rows_read rows_step rows_mac", nonnegative=True)
TILES_READ, TILES_STEP, TILES_MAC = sympy.symbols("tiles_read tiles_step tiles_mac", nonnegative=True)
LAUNCH, FIRST, SECOND, FOLLOWING = sympy.symbols("launch first second following", nonnegative=True)
"""On a GPU: of a kernel, of both projections, and of the first for reading rows by their order (`gpu`); 0 elsewhere."""
ARGUMENTS = (
    T, H, I, E, K, GATED, SIZE, TILE_SIZE, MOVE, TURN, LANES, ROWS_READ, ROWS_STEP, ROWS_MAC, TILES_READ, TILES_STEP,
    TILES_MAC, LAUNCH, FIRST, SECOND, FOLLOWING,
)  # fmt: skip
"""What expressions are made of, in one order."""

FLOAT = 4
"""Bytes of a sum, and of an element of rows that the token-major kernel reads."""
ACTIVE = E * (1 - (1 - K / E) ** T)
SLOTS = T * K
PER_EXPERT = SLOTS / ACTIVE
PADDED = ACTIVE * ceiling(PER_EXPERT / LANES) * LANES
"""Rows of all tiles."""
BY_ROWS = ACTIVE * Max(ROWS_READ, ROWS_STEP + ROWS_MAC * PER_EXPERT)
BY_TILES = ACTIVE * Max(TILES_READ, TILES_STEP + TILES_MAC * ceiling(PER_EXPERT / LANES) * LANES)
"""Of one weight of each expert that has tokens, by either kernel."""

Costs = Mapping[tuple[Place, Place], Expr]
ZERO = sympy.Integer(0)
TOKENS, IN_SLOTS, TILES = Place
CPU, TRITON, CUDA, PRODUCTS = TARGETS = ("cpu", "triton", "cuda", "products")
"""What computes a region: a kernel for CPUs, one of either kind for GPUs, or PyTorch's grouped products on a GPU."""
GATHER: Expr = LAUNCH + MOVE * SLOTS * H * 2 * SIZE
"""Rows of tokens copied to slots on a GPU."""


class Declaration:
    """The layouts of one op.

    Attributes:
        op: its name.
        costs: of each pair (layout that it reads, layout that it writes) that it supports on a CPU. The table must be
            submodular in the order of `algebra.Place` (see `cut`); it is checked when it is used.
        gpu: the same for other targets, by their names.
    """

    op: ClassVar[str]
    costs: ClassVar[Costs]
    gpu: ClassVar[Mapping[str, Costs]]

    @classmethod
    def on(cls, target: str) -> Costs:
        """Its costs on one of `TARGETS`."""
        return cls.costs if target == CPU else cls.gpu[target]


def on_gpus(costs: Costs) -> Mapping[str, Costs]:
    """The same on all targets that are GPUs."""
    return dict.fromkeys((TRITON, CUDA, PRODUCTS), costs)


class Gather(Declaration):
    """Tokens as their experts read them: converted once for all, copied to slots, or written as tiles at once.

    On a GPU nothing is done for kernels that gather while they load; grouped products read slots only.
    """

    op = "gather"
    costs: ClassVar[Costs] = {
        (TOKENS, TOKENS): MOVE * T * H * (SIZE + FLOAT),
        (TOKENS, IN_SLOTS): MOVE * SLOTS * H * (SIZE + FLOAT),
        (TOKENS, TILES): TURN * PADDED * H * TILE_SIZE,
    }
    gpu: ClassVar[Mapping[str, Costs]] = {
        TRITON: {(TOKENS, TOKENS): ZERO, (TOKENS, IN_SLOTS): GATHER},
        CUDA: {(TOKENS, TOKENS): ZERO},
        PRODUCTS: {(TOKENS, IN_SLOTS): GATHER},
    }


class ExpertUp(Declaration):
    """Gate and up. Tiles may be turned on their way out. What GPUs write is slot-major for whatever they read."""

    op = "expert_up"
    costs: ClassVar[Costs] = {
        (TOKENS, IN_SLOTS): GATED * H * I * BY_ROWS,
        (IN_SLOTS, IN_SLOTS): GATED * H * I * BY_ROWS,
        (TILES, IN_SLOTS): GATED * H * I * BY_TILES + TURN * SLOTS * I * SIZE,
        (TILES, TILES): GATED * H * I * BY_TILES,
    }
    gpu: ClassVar[Mapping[str, Costs]] = {
        TRITON: {(TOKENS, IN_SLOTS): FIRST + FOLLOWING, (IN_SLOTS, IN_SLOTS): FIRST},
        CUDA: {(TOKENS, IN_SLOTS): FIRST + FOLLOWING},
        PRODUCTS: {(IN_SLOTS, IN_SLOTS): FIRST},
    }


class ExpertDown(Declaration):
    """The projection back. What tiles give is turned while it is in registers, so it leaves as rows either way."""

    op = "expert_down"
    costs: ClassVar[Costs] = {(IN_SLOTS, IN_SLOTS): H * I * BY_ROWS, (TILES, IN_SLOTS): H * I * BY_TILES}
    gpu = on_gpus({(IN_SLOTS, IN_SLOTS): SECOND})


class Combine(Declaration):
    """Adds rows of slots to those of their tokens."""

    op = "combine"
    costs: ClassVar[Costs] = {(IN_SLOTS, TOKENS): MOVE * SLOTS * H * 2 * FLOAT}
    gpu = on_gpus({(IN_SLOTS, TOKENS): LAUNCH + MOVE * (SLOTS + T) * H * SIZE})


class Elementwise(Declaration):
    """Any order will do, and kernels do it while sums are in registers."""

    costs: ClassVar[Costs] = {(IN_SLOTS, IN_SLOTS): ZERO, (TILES, TILES): ZERO}
    gpu = on_gpus({(IN_SLOTS, IN_SLOTS): ZERO})


class Activation(Elementwise):
    """Of gate and up. What follows products on a GPU is one pass, with the bias."""

    op = "activation"
    gpu: ClassVar[Mapping[str, Costs]] = {
        **Elementwise.gpu,
        PRODUCTS: {(IN_SLOTS, IN_SLOTS): LAUNCH + MOVE * SLOTS * I * (GATED + 1) * SIZE},
    }


class Bias(Elementwise):
    """A row of each expert."""

    op = "bias"


class Scale(Elementwise):
    """Routing weights."""

    op = "scale"


class Multiply(Elementwise):
    """Of two operands that have one layout."""

    op = "multiply"


class Cast(Elementwise):
    """To another dtype."""

    op = "cast"


class OnTokens(Declaration):
    """Beside the experts: what it is added to, or normalised by, has one row a token."""

    costs: ClassVar[Costs] = {(TOKENS, TOKENS): MOVE * T * H * 2 * FLOAT}
    gpu = on_gpus({(TOKENS, TOKENS): LAUNCH + MOVE * T * H * 2 * SIZE})


class ResidualAdd(OnTokens):
    """Of what the block came in with."""

    op = "residual_add"


class SharedExpertAdd(OnTokens):
    """Of an expert that all tokens take."""

    op = "shared_expert_add"


class RmsNorm(OnTokens):
    """Sums over features, so they must be contiguous; over tokens, so that it runs once for each."""

    op = "rms_norm"


@functools.cache
def steps(width: Expr) -> tuple[Expr, Expr]:
    """What a conversion between neighbouring layouts costs, of rows of so many features.

    From tokens to slots, and between slots and tiles, either way. Longer ones are made of these; an op that does
    better, as `Gather` does, says so in its declaration. The first is two kernels, as it also computes whose rows.
    """
    return 2 * LAUNCH + MOVE * SLOTS * width * 2 * SIZE, LAUNCH + TURN * SLOTS * width * (SIZE + TILE_SIZE)


DECLARATIONS: Mapping[str, type[Declaration]] = {
    kind.op: kind
    for kind in (
        Gather, ExpertUp, ExpertDown, Combine, Activation, Bias, Scale, Multiply, Cast, ResidualAdd, SharedExpertAdd,
        RmsNorm,
    )
}  # fmt: skip
"""By the op's name."""
