"""How long a candidate takes, as formulas in sympy: bytes over bandwidth, operations over rate, whole waves of blocks.

A projection of S slots reads the weights of the experts that are hit from memory once, and from the cache once for
each tile of slots; it multiplies padding like anything else. What is slowest decides. Nothing here was measured on a
GPU: the numbers are from data sheets and from counting instructions (see docs/gpu_selection.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy

from samoyeds_codegen.cuda.layout import COLUMNS, PIECE_BYTES, ROWS
from samoyeds_codegen.cuda.spec import ALONE, Variant
from samoyeds_codegen.gpu.candidate import Candidate, variant_of
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.triton.spec import ExpertsSpec, Tile

LATENCY = 8e-7
"""Seconds from a request to memory to its bytes: so much has to be under way for full bandwidth (Little's law)."""
LAUNCH = 2e-6
"""Seconds that a projection takes beyond its work."""
TRITON_SHARE, MMA_SHARE = 0.6, 0.6
"""Of the rate of their instruction, that such kernels are assumed to reach."""
UNPACK_CLOCKS = 0.1
"""Of a multiprocessor, to spread one kept position and its neighbour in Triton: 800 instructions of a thread for 64 x
128 columns, counted in machine code."""
CACHE_LATENCY = 2e-7
"""Seconds from a request to the second-level cache to its bytes; assumed."""
PEER_BYTES = 14
"""That a multiprocessor sends another one of its cluster in a clock: 3.3 TB/s of an H100 (arXiv 2402.13499)."""
RESIDENT = 2
"""Blocks of a multiprocessor at a time; wgmma kernels have one, which stays."""

S, E, R, C = sympy.symbols("slots experts rows columns", positive=True)
r, n = sympy.symbols("tile_rows tile_slots", positive=True)
width, density, spread = sympy.symbols("bytes_of_weight density spread", nonnegative=True)
places, under_way = sympy.symbols("places bytes_under_way", positive=True)
bandwidth, cache, rate, clock = sympy.symbols("bandwidth cache_bandwidth rate clock", positive=True)
weights_sent, tokens_sent = sympy.symbols("weights_sent tokens_sent", nonnegative=True)

hit = E * (1 - (1 - 1 / E) ** S)
"""Experts that have slots, on average over random routing."""
tiles = hit * sympy.ceiling(S / (hit * n))
blocks = tiles * sympy.ceiling(R / r)
busy = blocks / (places * sympy.ceiling(blocks / places))
"""The share of places that have work, over all waves."""
moved = hit * R * C * width + 2 * S * (C + R)
memory, asked = moved / bandwidth, moved * LATENCY / (sympy.Min(blocks, places) * under_way)
from_cache = (tiles * R * C * width + 2 * blocks * n * C) / cache
products = 2 * tiles * n * R * C * density / (rate * busy)
unpacking = tiles * R * C * spread / (clock * busy)
sent = (weights_sent * tiles * R * C * width + tokens_sent * 2 * blocks * n * C) / (PEER_BYTES * clock)
seconds = LAUNCH + sympy.Max(memory, asked, from_cache, products, unpacking, sent)
wait = CACHE_LATENCY * sympy.ceiling(blocks / places)
by_order = LAUNCH + sympy.Max(memory, asked + wait, from_cache, products + wait, unpacking + wait, sent)
"""The same where rows are read by their order: each block reads that before it can ask for the first row. Where memory
or cache are busy with other blocks it waits for nothing."""
ARGUMENTS = (
    S, E, R, C, r, n, width, density, spread, places, under_way, bandwidth, cache, rate, clock, weights_sent,
    tokens_sent,
)  # fmt: skip


@functools.cache
def _compiled(expression: sympy.Expr) -> Callable[..., float]:
    found: Callable[..., float] = sympy.lambdify(ARGUMENTS, expression, "math", cse=True)
    return found


@dataclass(frozen=True)
class Block:
    """Sizes of a block: E experts, H, I."""

    experts: int
    hidden: int
    width: int


def cost(candidate: Candidate, spec: ExpertsSpec, block: Block, slots: int, device: Device) -> float:
    """Seconds of both projections; the rest of a block costs the same whatever computes these."""
    return sum(projection_seconds(candidate, op, spec, block, slots, device) for op in ("up", "down"))


def projection_seconds(
    candidate: Candidate, op: str, spec: ExpertsSpec, block: Block, slots: int, device: Device
) -> float:
    """Seconds of one projection, ``up`` or ``down``, whose rows are asked for at once."""
    return _evaluate(seconds, candidate, op, spec, block, slots, device)


def by_order_seconds(candidate: Candidate, spec: ExpertsSpec, block: Block, slots: int, device: Device) -> float:
    """Seconds of the first projection where it reads rows of tokens, by the order of the slots."""
    return _evaluate(by_order, candidate, "up", spec, block, slots, device)


def _evaluate(
    expression: sympy.Expr, candidate: Candidate, op: str, spec: ExpertsSpec, block: Block, slots: int, device: Device
) -> float:  # fmt: skip
    sides = 2 if spec.gated else 1
    rows, columns = (sides * block.width, block.hidden) if op == "up" else (block.hidden, block.width)
    use = _triton(candidate, op, spec, device) if candidate.tiles is not None else _cuda(candidate, spec, device)
    return _compiled(expression)(
        slots, block.experts, rows, columns, use.rows, candidate.slots, _weight_bytes(spec), use.density, use.spread,
        use.places, use.under_way, device.bandwidth, device.cache_bandwidth, use.rate, device.clock * device.processors,
        use.variant.shares_weights, use.variant.shares_tokens,
    )  # fmt: skip


@dataclass(frozen=True)
class _Use:
    """What a kernel makes of the device.

    Attributes:
        rows: dense rows of a thread block.
        density: the share of dense weights that it multiplies.
        spread: clocks of a multiprocessor to spread a dense weight.
        places: blocks, or clusters of them, that run at a time.
        under_way: bytes of weights that each of them has asked for; rows come from the cache.
        rate: operations a second.
        variant: of its blocks.
    """

    rows: int
    density: float
    spread: float
    places: int
    under_way: int
    rate: float
    variant: Variant = ALONE


def _kept_rows(spec: ExpertsSpec) -> float:
    return 1.0 if spec.pattern is None else spec.pattern.n / spec.pattern.m


def _weight_bytes(spec: ExpertsSpec) -> float:
    """For a dense weight; metadata is 2 bits for each kept value."""
    size = 4 if spec.dtype == "float32" else 2
    return size if spec.pattern is None else _kept_rows(spec) * (size / 2 + 1 / 8)


def _triton(candidate: Candidate, op: str, spec: ExpertsSpec, device: Device) -> _Use:
    assert candidate.tiles is not None
    tile: Tile = getattr(candidate.tiles, op)
    kept = _kept_rows(spec)
    sides = 2 if op == "up" and spec.gated else 1
    stored = _weight_bytes(spec) / kept
    under_way = int((tile.stages - 1) * tile.cols * sides * tile.rows * stored)
    rate = TRITON_SHARE * device.flops_per_clock * device.clock * device.processors
    spread = 0.0 if spec.pattern is None else UNPACK_CLOCKS * kept
    return _Use(
        int(sides * tile.rows / kept), kept, spread, RESIDENT * device.processors, under_way,
        rate / 16 if spec.dtype == "float32" else rate,
    )  # fmt: skip


def _cuda(candidate: Candidate, spec: ExpertsSpec, device: Device) -> _Use:
    """Half of the kept rows' columns are multiplied, at the dense rate. A cluster counts as one block."""
    variant, kept = variant_of(candidate.kind), _kept_rows(spec)
    if candidate.kind == "mma":
        pieces, places, share = 1, device.processors * RESIDENT, MMA_SHARE * device.mma_share
    else:
        pieces = 4 if variant.shares_tokens else 2
        places = device.processors // variant.cluster
        tokens = candidate.slots // (variant.cluster if variant.shares_weights else 1)
        share = wgmma_share(tokens, variant)
        if variant.in_registers:
            share = min(share, answered_share(tokens, device))
    rate = share * device.flops_per_clock * device.clock * device.processors
    return _Use(math.ceil(pieces * ROWS / kept), kept / 2, 0.0, places, 3 * pieces * PIECE_BYTES, rate, variant)


def wgmma_share(tokens: int, variant: Variant = ALONE) -> float:
    """Of the sparse rate, where shared memory is the limit: 128 bytes a clock for both operands and their copies.

    Two groups of 64 rows share a tile of tokens; each product of 32 columns reads 64 N bytes of tokens and 2 KiB of
    weights, and both have been written once. What a cluster shares is read half once more, to be sent. Weights in
    registers are not there, but lanes exchange half of them, and that passes through shared memory, too.
    """
    read, weights = 64 * tokens, 2048
    moved = 2 * read + read + (read / 2 if variant.shares_tokens else 0)
    moved += weights if variant.in_registers else 4 * weights + (weights if variant.shares_weights else 0)
    return 2 * read / moved


def answered_share(tokens: int, device: Device) -> float:
    """The same where weights are asked for a block of columns ahead: it takes no less than the cache's answer."""
    clocks = 2 * 2 * ROWS * tokens * COLUMNS / 2 / device.flops_per_clock
    return clocks / (CACHE_LATENCY * device.clock)
