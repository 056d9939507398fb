"""Which tiles compute a block, by how many slots an expert has on average: a model of cost, nothing is measured.

A tile reads the weights of its rows once and multiplies as many slots as it has, be they live or padding. So the best
tile is the one that reads weights least often, and of those the one with the least padding. The sizes of the tiles
are such that no register is spilled on sm_80, sm_90 and sm_100 (`assemble`; tests/codegen/triton/test_assemble.py) and
that shared memory is enough on every GPU since sm_80.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Pattern, Tile


@dataclass(frozen=True)
class Tiles:
    """The tiles of both projections of a block; they share a work list, so both have the same slots."""

    up: Tile
    down: Tile

    @property
    def slots(self) -> int:
        """Slots of one expert that a program computes."""
        return self.up.slots


def _both(tile: Tile) -> Tiles:
    return Tiles(tile, tile)


HALF: Mapping[str, tuple[Tiles, ...]] = {
    # rows (condensed where sub-rows are chosen), slots, columns, warps, stages; columns at most a vector then
    "dense": (
        _both(Tile(32, 16, 128, 4, 4)),
        _both(Tile(64, 64, 64, 4, 3)),
        Tiles(Tile(64, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    ),
    "1:1": (
        _both(Tile(32, 16, 128, 4, 3)),
        Tiles(Tile(64, 64, 64, 8, 3), Tile(64, 64, 64, 4, 3)),
        _both(Tile(64, 128, 64, 8, 3)),
    ),
    "1:2": (
        _both(Tile(32, 16, 64, 4, 3)),
        Tiles(Tile(32, 64, 64, 4, 3), Tile(64, 64, 64, 8, 3)),
    ),
    "2:4": (
        _both(Tile(32, 16, 64, 4, 3)),
        Tiles(Tile(32, 64, 64, 8, 3), Tile(64, 64, 64, 8, 3)),
    ),
}
"""Of bfloat16 and float16 weights, by pattern, fewest slots first."""
FULL: Mapping[str, tuple[Tiles, ...]] = {
    "dense": (_both(Tile(32, 16, 32, 4, 3)), _both(Tile(32, 32, 32, 4, 3))),
    "1:1": (_both(Tile(32, 16, 32, 4, 3)), _both(Tile(32, 32, 32, 4, 3))),
    "1:2": (_both(Tile(32, 16, 32, 4, 3)),),
    "2:4": (_both(Tile(16, 16, 32, 4, 3)),),
}
"""Of float32 weights, whose products are no tensor core's."""


BACK = {"half": (Tile(64, 16, 64, 4, 3), Tile(64, 64, 64, 4, 3)), "full": (Tile(32, 16, 32, 4, 3),)}
"""Of ``back``, for 16 and 32 bit weights: rows are those of a step, columns those of the result."""
MOST_STAGES = 6
"""Of short steps; more of them need registers to tell them apart."""


def candidates(spec: ExpertsSpec) -> tuple[Tiles, ...]:
    """The tiles that may compute a block, fewest slots first."""
    pattern = spec.pattern
    table = FULL if spec.dtype == "float32" else HALF
    found = table["dense" if pattern is None else f"{pattern.n}:{pattern.m}"]
    return tuple(Tiles(_cut(tiles.up, pattern), _cut(tiles.down, pattern)) for tiles in found)


def choose(spec: ExpertsSpec, slots: int, experts: int) -> Tiles:
    """The tiles for S slots of E experts; both are known on the host, so nothing waits for the device."""
    mean = max(-(-slots // experts), 1)
    return min(candidates(spec), key=lambda tiles: (-(-mean // tiles.slots), tiles.slots))


def kernels(spec: ExpertsSpec) -> tuple[KernelSpec, ...]:
    """Every projection that `choose` may pick for a block."""
    found = [KernelSpec(op, spec, getattr(tiles, op)) for tiles in candidates(spec) for op in ("up", "down")]
    return tuple(dict.fromkeys(found))


def backs(spec: ExpertsSpec) -> tuple[KernelSpec, ...]:
    """The kernels that may multiply rows by packed weights themselves, fewest slots first."""
    tiles = BACK["full" if spec.dtype == "float32" else "half"]
    return tuple(KernelSpec("back", spec, _cut(tile, spec.pattern)) for tile in tiles)


def choose_back(spec: ExpertsSpec, slots: int, experts: int) -> KernelSpec:
    """That of them for S slots of E experts."""
    mean = max(-(-slots // experts), 1)
    return min(backs(spec), key=lambda kernel: (-(-mean // kernel.tile.slots), kernel.tile.slots))


def _cut(tile: Tile, pattern: Pattern | None) -> Tile:
    """A tile that spans no more than one vector of chosen sub-rows, with as much of the weight under way."""
    if pattern is None or not pattern.selects or tile.cols <= pattern.vector:
        return tile
    stages = min(tile.stages * (tile.cols // pattern.vector), MOST_STAGES)
    return replace(tile, cols=pattern.vector, stages=stages)
