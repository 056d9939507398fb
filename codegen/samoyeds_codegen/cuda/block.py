"""A whole block of experts as launches: the routing plan, up, down, and the weighted sum."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from samoyeds_codegen import expr
from samoyeds_codegen.cuda.launch import Launch
from samoyeds_codegen.cuda.layout import COLUMNS, ROWS
from samoyeds_codegen.cuda.operands import Projection
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.spec import (
    ALONE,
    MOST_SUMS,
    SHARED_LIMIT,
    TILE_TOKENS,
    CombineSpec,
    ProjectionSpec,
    RouteSpec,
    Variant,
    instruction_of,
)

WIDTH = 8
"""Elements of 16 bytes: rows are read so."""


@dataclass(frozen=True)
class Experts:
    """The experts of a block: ``down(activation(up(x)))``; with gates, up holds both.

    Attributes:
        pattern: of all weights.
        activation: an expression of `samoyeds_codegen.expr`.
        gated: whether the first projection has gates.
        up, down: the projections, in the dtype of the rows.
    """

    pattern: Pattern
    activation: str
    gated: bool
    up: Projection
    down: Projection


@dataclass(frozen=True)
class Routing:
    """Which experts have which tokens.

    Attributes:
        ids_TK: int32 or int64; what is no expert contributes nothing.
        weights_TK: float32 or 16-bit floats.
    """

    ids_TK: Tensor
    weights_TK: Tensor


@dataclass(frozen=True)
class Plan:
    """A routing plan, as ``samoyeds::route`` makes it too, and a list of tiles.

    Attributes:
        order_S: int64, slots sorted by expert: the place of each in [T, K].
        slot_TK: int64, the inverse.
        offsets_E: int32, where each expert's slots end.
        tiles: int32 [most, 4]: expert, first slot, slots.
        count: int32 [1]: how many tiles there are.
    """

    order_S: Tensor
    slot_TK: Tensor
    offsets_E: Tensor
    tiles: Tensor
    count: Tensor


@dataclass(frozen=True)
class Block:
    """Launches in order, and what they leave."""

    launches: list[Launch]
    out_TH: Tensor


def plan_block(
    x_TH: Tensor, experts: Experts, routing: Routing, target: str, processors: int, out_dtype: torch.dtype,
    tile: int | None = None, variant: Variant = ALONE,
) -> Block:  # fmt: skip
    """Launches that compute a block. Nothing is launched, and nothing waits for the device: shapes are enough.

    Args:
        x_TH: tokens in bfloat16 or float16.
        experts: their weights.
        routing: which experts have which tokens.
        target: see `ProjectionSpec`.
        processors: multiprocessors of the device; so many blocks of persistent kernels run.
        out_dtype: of the result.
        tile: slots of one expert that a block or cluster computes; None: about as many as an expert has on average.
        variant: of the projections.

    Returns:
        The launches and the result, [T, H], which is theirs to fill.

    Raises:
        UnsupportedSpecError: there is no kernel for these.
    """
    tokens, top_k = routing.ids_TK.shape
    out_TH = x_TH.new_empty(tokens, experts.down.features, dtype=out_dtype)
    if not out_TH.numel() or not top_k:
        return Block([], out_TH.zero_())
    count = experts.down.matrix.values.shape[0]
    each = tile or tokens * top_k / count
    up, down = (_spec(op, target, experts, x_TH.dtype, each, variant) for op in ("up", "down"))
    launch, plan = plan_routing(RouteSpec(target, count, up.slots, _name(routing.ids_TK)), routing.ids_TK)
    first, h_SI = project(up, experts.up, readable(x_TH), plan, processors)
    second, y_SH = project(down, experts.down, h_SI, plan, processors)
    return Block([launch, first, second, combine(target, y_SH, plan, routing.weights_TK, out_TH)], out_TH)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _spec(
    op: str, target: str, experts: Experts, dtype: torch.dtype, tokens_per_expert: float, variant: Variant
) -> ProjectionSpec:  # fmt: skip
    name, bias = str(dtype).removeprefix("torch."), (experts.up if op == "up" else experts.down).has_bias
    return choose(
        op, target, experts.pattern, name, experts.activation, experts.gated, bias, tokens_per_expert, variant
    )


def choose(
    op: str, target: str, pattern: Pattern, dtype: str, activation: str, gated: bool, bias: bool,
    tokens_per_expert: float, variant: Variant = ALONE,
) -> ProjectionSpec:  # fmt: skip
    """The kernel of a projection: a tile for an expert's tokens, if its sums fit, and up to 4 stages, if they fit.

    Args:
        op, target, pattern, dtype: see `ProjectionSpec`.
        activation, gated: of the experts; a down projection has none.
        bias: whether this projection has one.
        tokens_per_expert: about how many.
        variant: see `ProjectionSpec`.

    Raises:
        UnsupportedSpecError: there is none.
    """
    up, instruction = op == "up", instruction_of(target)
    most = MOST_SUMS[instruction] * 2 // pattern.sets
    fitting = [t for t in TILE_TOKENS[instruction] if t <= most]
    each = tokens_per_expert / (variant.cluster if variant.shares_weights else 1)
    least = ProjectionSpec(
        op, target, pattern, dtype, 128 if instruction == "wgmma" else 64,
        next((t for t in fitting if t >= each), fitting[-1]), 2,
        activation if up else expr.IDENTITY, up and gated, bias, variant,
    )  # fmt: skip
    stages = SHARED_LIMIT[target] * 1024 * least.stages // least.shared_bytes
    return replace(least, stages=min(stages, 4))


def plan_routing(spec: RouteSpec, ids_TK: Tensor) -> tuple[Launch, Plan]:
    """The launch that makes a routing plan, with room for the most tiles there can be.

    They are all full but for one of each expert that has slots.
    """
    slots, new = ids_TK.numel(), ids_TK.new_empty
    most = slots // spec.tokens + min(slots, spec.experts)
    order, places, offsets = (
        new(slots, dtype=torch.int64),
        new(ids_TK.shape, dtype=torch.int64),
        new(spec.experts, dtype=torch.int32),
    )
    plan = Plan(order, places, offsets, new(most, 4, dtype=torch.int32), new(1, dtype=torch.int32))
    arguments: dict[str, Tensor | int | None] = {
        "ids": ids_TK.contiguous(), "order": order, "places": places, "offsets": offsets, "tiles": plan.tiles,
        "tile_count": plan.count, "slots": slots, "unused": 0,
    }  # fmt: skip
    return Launch(spec, (1, 1), arguments), plan


def project(spec: ProjectionSpec, weights: Projection, x: Tensor, plan: Plan, processors: int) -> tuple[Launch, Tensor]:
    """A projection of the slots of a routing plan.

    Args:
        spec: the kernel.
        weights: what it multiplies with.
        x: rows of tokens or of slots, which start at multiples of 16 bytes.
        plan: the plan, with tiles of at most ``spec.slots`` slots.
        processors: see `plan_block`.

    Returns:
        The launch, and its result: for each slot a row of all features and of what pads them.
    """
    each = ROWS // 2 if spec.gated else ROWS  # rows of a matrix in a row tile
    row_tiles = -(-weights.rows // (each * spec.row_tiles_together)) * spec.row_tiles_together
    features = row_tiles * each * spec.pattern.dense_rows
    out = x.new_empty(plan.order_S.shape[0], features)
    arguments: dict[str, Tensor | int | None] = {
        "x": x, **weights.arguments(x.dtype), "order": plan.order_S, "tiles": plan.tiles,
        "tile_count": plan.count, "out": out, "x_stride": x.stride(0), "out_stride": features,
        "features": weights.features, "columns": min(x.shape[1], -(-weights.columns // WIDTH) * WIDTH),
        "rows": weights.rows, "width": weights.width, "column_blocks": -(-weights.width // COLUMNS),
        "row_tiles": row_tiles, "top_k": plan.slot_TK.shape[1],
    }  # fmt: skip
    blocks = (
        processors // spec.cluster * spec.cluster if spec.wgmma else plan.tiles.shape[0] * row_tiles // spec.row_tiles
    )
    return Launch(spec, (blocks, 1), arguments), out


def combine(target: str, y_SH: Tensor, plan: Plan, weights_TK: Tensor, out_TH: Tensor) -> Launch:
    """The launch that sums each token's rows, in slot order, into ``out_TH``."""
    tokens, columns = out_TH.shape
    spec = CombineSpec(target, _name(y_SH), _name(weights_TK), _name(out_TH))
    arguments: dict[str, Tensor | int | None] = {
        "rows": y_SH, "weights": weights_TK.contiguous(), "slots": plan.slot_TK,
        "owned": plan.offsets_E[-1:], "out": out_TH, "row_stride": y_SH.stride(0), "columns": columns,
        "top_k": plan.slot_TK.shape[1],
    }  # fmt: skip
    return Launch(spec, (tokens, -(-columns // (spec.threads * WIDTH))), arguments)


def readable(x_TH: Tensor) -> Tensor:
    """Rows whose starts are multiples of 16 bytes, zeros behind them: a copy only where they are not so already."""
    even = x_TH.stride(1) == 1 and x_TH.stride(0) % WIDTH == 0 and x_TH.shape[1] % WIDTH == 0
    if even and x_TH.data_ptr() % 16 == 0:
        return x_TH
    return pad(x_TH, (0, -x_TH.shape[1] % WIDTH)).contiguous()
