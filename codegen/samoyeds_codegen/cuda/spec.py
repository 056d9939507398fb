"""What a CUDA kernel computes: pure data, hashable and printable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from samoyeds_codegen import expr
from samoyeds_codegen.cpp.activation import to_cpp
from samoyeds_codegen.cuda.layout import COLUMNS, METADATA_BYTES, ROWS, VALUE_BYTES
from samoyeds_codegen.cuda.pattern import Pattern, require

DTYPES = ("bfloat16", "float16")
WGMMA_TARGET = "sm_90a"
SHARED_LIMIT = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_90a": 227, "sm_100": 227, "sm_120": 99,
}  # fmt: skip
"""KiB of shared memory that a block may have (CUDA C++ Programming Guide, "Compute Capabilities")."""
TILE_TOKENS = {"mma": (8, 16, 32, 64), "wgmma": (16, 32, 64, 128)}
MOST_SUMS = {"mma": 96, "wgmma": 128}
"""Registers of a thread for sums; with more than these, kernels spill."""

MOST_EXPERTS = 1024
"""Of a routing plan, whose counts lie in shared memory."""


def instruction_of(target: str) -> str:
    """What multiplies on a target: ``mma`` or ``wgmma``."""
    return "wgmma" if target == WGMMA_TARGET else "mma"


def _check_target(target: str) -> None:
    require(target in SHARED_LIMIT, f"target {target} is not one of {', '.join(SHARED_LIMIT)}")


@dataclass(frozen=True)
class Variant:
    """How thread blocks come by what they multiply.

    Attributes:
        weights: from where products read them: ``shared`` memory, or ``registers`` (wgmma).
        cluster: thread blocks that share something: 1, or 2 (wgmma).
        shares: what that is: ``weights``, each block having other tokens, or ``tokens``, each having other rows.

    Raises:
        UnsupportedSpecError: there is no such kernel.
    """

    weights: str = "shared"
    cluster: int = 1
    shares: str = "weights"

    def __post_init__(self) -> None:
        require(self.weights in ("shared", "registers"), f"weights in {self.weights} are not in shared or registers")
        require(self.cluster in (1, 2), f"clusters of {self.cluster} blocks have no kernel")
        require(self.shares in ("weights", "tokens"), f"what is shared, {self.shares}, is not weights or tokens")
        both = self.in_registers and self.shares_weights
        require(not both, "blocks of a cluster do not share weights that lie in registers")

    @property
    def in_registers(self) -> bool:
        """Whether products read weights from registers."""
        return self.weights == "registers"

    @property
    def shares_weights(self) -> bool:
        """Whether there is another block with the same weights."""
        return self.cluster > 1 and self.shares == "weights"

    @property
    def shares_tokens(self) -> bool:
        """Whether there is another block with the same tokens."""
        return self.cluster > 1 and self.shares == "tokens"

    def __str__(self) -> str:
        """What a kernel is called by it; nothing for a block alone that reads shared memory."""
        place = " from registers" if self.in_registers else ""
        return place + (f" sharing {self.shares}" if self.cluster > 1 else "")


ALONE = Variant()
VARIANTS: Mapping[str, Variant] = {
    "wgmma": ALONE,
    "pairs": Variant(cluster=2),
    "registers": Variant("registers"),
    "token_pairs": Variant(cluster=2, shares="tokens"),
    "register_pairs": Variant("registers", 2, "tokens"),
}
"""Of warpgroup kernels, by names for reports."""


@dataclass(frozen=True)
class ProjectionSpec:
    """One projection of all experts: ``activation(W x + bias)`` for every slot of a routing plan.

    Attributes:
        op: ``up`` reads the tokens of slots out of x [T, H]; ``down`` reads rows that are in slot order, [S, I].
        target: what it is compiled for. ``sm_90a`` means ``wgmma.sp``, all others ``mma.sp``.
        pattern: of the weights.
        dtype: of weights, rows, biases and results; sums are float32.
        rows: condensed rows of a thread block: 64 or 128.
        tokens: tokens of a thread block.
        stages: buffers that copies fill ahead.
        activation: an expression of `samoyeds_codegen.expr`.
        gated: whether there is a gate, so the expression reads ``gate`` and ``up``, not ``x``; a slab has rows of both.
        bias: whether there is one.
        variant: how blocks come by weights and tokens.

    Raises:
        UnsupportedSpecError: there is no kernel for it; the message says why.
    """

    op: str
    target: str
    pattern: Pattern
    dtype: str = "bfloat16"
    rows: int = 64
    tokens: int = 16
    stages: int = 4
    activation: str = expr.IDENTITY
    gated: bool = False
    bias: bool = False
    variant: Variant = ALONE

    def __post_init__(self) -> None:
        require(self.op in ("up", "down"), f"op {self.op} is not up or down")
        _check_target(self.target)
        require(self.dtype in DTYPES, f"dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        require(self.op == "up" or not self.gated, "only up projections have gates")
        offered = set(expr.GATED_NAMES) if self.gated else {expr.PLAIN_NAME}
        require(expr.names(self.activation) <= offered, f"activation {self.activation!r} reads other names")
        to_cpp(self.activation)
        self._check_tile()

    def _check_tile(self) -> None:
        tiles, most = TILE_TOKENS[self.instruction], MOST_SUMS[self.instruction]
        require(self.tokens in tiles, f"a tile of {self.tokens} tokens is not one of {tiles}")
        rows = (128,) if self.wgmma else (64, 128)
        require(self.rows in rows, f"a tile of {self.rows} rows is not one of {rows}")
        self._check_variant()
        require(2 <= self.stages <= 8, f"{self.stages} stages are not 2 to 8")
        require(self.sums <= most, f"{self.sums} sums in each thread spill, {most} do not; take fewer rows or tokens")
        limit = SHARED_LIMIT[self.target] * 1024
        require(
            self.shared_bytes <= limit,
            f"{self.stages} stages need {self.shared_bytes} bytes of shared memory, {self.target} has {limit}",
        )

    def _check_variant(self) -> None:
        require(self.wgmma or self.variant == ALONE, f"kernels{self.variant} need wgmma, which {self.target} has not")
        if self.variant.in_registers:
            torn = f"vectors of {self.pattern.vector} columns are torn apart where registers hold weights"
            require(not self.pattern.selects or self.pattern.vector % 64 == 0, torn)
        halves = not self.variant.shares_tokens or self.tokens % 32 == 0
        require(halves, f"half of {self.tokens} tokens is no multiple of 16, which two blocks would copy each")

    @property
    def cluster(self) -> int:
        """Thread blocks in a cluster."""
        return self.variant.cluster

    @property
    def row_tiles_together(self) -> int:
        """Pieces of 64 rows that a cluster multiplies at a time."""
        return self.row_tiles * (self.cluster if self.variant.shares_tokens else 1)

    @property
    def wgmma(self) -> bool:
        """Whether it multiplies by warpgroups."""
        return self.instruction == "wgmma"

    @property
    def instruction(self) -> str:
        """``mma`` or ``wgmma``."""
        return instruction_of(self.target)

    @property
    def shared(self) -> bool:
        """Whether the rows of half a slab, which are one lane group's, agree on a sub-row everywhere."""
        return self.pattern.selects and self.pattern.n == 1 and self.pattern.group % 8 == 0

    @property
    def direct(self) -> bool:
        """Whether all rows of an instruction do; gates and ups, which take turns in a slab, choose for themselves."""
        return self.shared and not self.gated and self.pattern.group % (64 if self.wgmma else 16) == 0

    @property
    def slots(self) -> int:
        """Of one expert, that a tile of the routing plan has at most: the tokens of a cluster."""
        return self.tokens * (self.cluster if self.variant.shares_weights else 1)

    @property
    def row_tiles(self) -> int:
        """Pieces of 64 rows that a thread block multiplies at a time."""
        return self.rows // ROWS

    @property
    def sums(self) -> int:
        """Float32 sums that a thread holds."""
        tiles = 1 if self.wgmma else self.row_tiles  # a warpgroup has one of them, a warp a slab of each
        return tiles * self.pattern.sets * self.tokens // 2

    @property
    def value_bytes(self) -> int:
        """Of values, in a piece of weights in shared memory."""
        return 0 if self.variant.in_registers else VALUE_BYTES

    @property
    def piece_bytes(self) -> int:
        """Of a piece of weights in shared memory."""
        return self.value_bytes + METADATA_BYTES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage; tiles that wgmma reads swizzled start at multiples of 1024."""
        used = self.tokens * COLUMNS * 2 + self.row_tiles * self.piece_bytes
        return -(-used // 1024) * 1024 if self.wgmma else used

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the stages, and for wgmma two barriers for each."""
        return self.stages * (self.stage_bytes + (16 if self.wgmma else 0))

    @property
    def threads(self) -> int:
        """Of a block: 4 warps, or two warpgroups that multiply and one that copies."""
        return 384 if self.wgmma else 128

    def __str__(self) -> str:
        """One line for reports."""
        ending = f" {expr.display_name(self.activation)}" if self.activation != expr.IDENTITY else ""
        tile = f"{self.rows}x{self.tokens}x{self.stages}{self.variant}"
        return f"{self.op} {self.dtype} {self.pattern}{ending}{' bias' if self.bias else ''} {tile} {self.target}"


@dataclass(frozen=True)
class RouteSpec:
    """The routing plan: slots sorted by expert, and a list of tiles of at most ``tokens`` slots of one expert each.

    Attributes:
        target: what it is compiled for.
        experts: E.
        tokens: of a tile.
        ids: dtype of expert ids.

    Raises:
        UnsupportedSpecError: there is no kernel for it.
    """

    target: str
    experts: int
    tokens: int
    ids: str = "int64"

    def __post_init__(self) -> None:
        _check_target(self.target)
        require(self.ids in ("int32", "int64"), f"ids of {self.ids} are not int32 or int64")
        require(1 <= self.experts <= MOST_EXPERTS, f"{self.experts} experts are not 1 to {MOST_EXPERTS}")

    threads = 512
    cluster = 1

    @property
    def shared_bytes(self) -> int:
        """A count for each warp and expert, and for ids that are none."""
        return self.threads // 32 * (self.experts + 1) * 4

    def __str__(self) -> str:
        """One line for reports."""
        return f"route {self.ids} to {self.experts} experts, tiles of {self.tokens} {self.target}"


@dataclass(frozen=True)
class CombineSpec:
    """The weighted sum of each token's rows, in the order of its experts, and so the same bits every time.

    Attributes:
        target: what it is compiled for.
        dtype: of the rows.
        weights: dtype of the routing weights.
        out: dtype of the result.

    Raises:
        UnsupportedSpecError: there is no kernel for it.
    """

    target: str
    dtype: str
    weights: str
    out: str

    def __post_init__(self) -> None:
        _check_target(self.target)
        require(self.dtype in DTYPES, f"dtype {self.dtype} is not one of {', '.join(DTYPES)}")
        for dtype in (self.weights, self.out):
            require(dtype in (*DTYPES, "float32"), f"dtype {dtype} is not 16-bit or float32")

    shared_bytes = 0
    threads = 128
    cluster = 1

    def __str__(self) -> str:
        """One line for reports."""
        return f"combine {self.dtype} by {self.weights} to {self.out} {self.target}"


KernelSpec = ProjectionSpec | RouteSpec | CombineSpec
