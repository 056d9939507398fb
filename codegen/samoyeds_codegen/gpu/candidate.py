"""What may compute a block of experts on a device: a kind of kernel and its tile."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from samoyeds_codegen.cuda.block import choose as cuda_spec
from samoyeds_codegen.cuda.launch import target_of
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.spec import TILE_TOKENS, ProjectionSpec
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.triton.select import Tiles
from samoyeds_codegen.triton.select import candidates as triton_tiles
from samoyeds_codegen.triton.spec import ExpertsSpec

KINDS = ("triton", "mma", "wgmma", "pairs", "registers")
"""Triton for every kind of weights; for packed ones CUDA with sparse products of warps, of warpgroups, of warpgroups in
clusters of two blocks that share weights, or of warpgroups that read weights from registers."""
_WARPGROUPS = ("wgmma", "pairs", "registers")
SLOTS = {
    **TILE_TOKENS,
    "pairs": tuple(2 * tokens for tokens in TILE_TOKENS["wgmma"]),
    "registers": TILE_TOKENS["wgmma"][-2:],  # with fewer tokens memory is the limit, not what they relieve
}
"""Of one expert, that a thread block of CUDA, or a cluster, may compute."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a block.

    Attributes:
        kind: one of `KINDS`.
        slots: of one expert, that a program, thread block or cluster computes.
        tiles: of Triton; None for CUDA kernels, whose tile follows from the number of slots.
    """

    kind: str
    slots: int
    tiles: Tiles | None = None

    def __str__(self) -> str:
        """What measured results call it."""
        return f"{self.kind} {self.slots}" if self.tiles is None else f"triton {self.tiles.up} / {self.tiles.down}"


@functools.lru_cache(maxsize=256)
def candidates(spec: ExpertsSpec, kinds: tuple[str, ...], capability: tuple[int, int]) -> tuple[Candidate, ...]:
    """All candidates of these kinds; none of a kind that has no kernel for the block or the device."""
    found = [Candidate("triton", t.slots, t) for t in triton_tiles(spec)] if "triton" in kinds else []
    for kind, slots in SLOTS.items():
        if kind in kinds:
            found += [Candidate(kind, count) for count in slots if _exists(spec, kind, count, capability)]
    return tuple(found)


def _exists(spec: ExpertsSpec, kind: str, slots: int, capability: tuple[int, int]) -> bool:
    try:
        found = [projection(spec, op, kind, slots, capability) for op in ("up", "down")]
        return all(kernel.slots == slots and (kernel.cluster > 1) == (kind == "pairs") for kernel in found)
    except UnsupportedSpecError:
        return False


def cuda_pattern(spec: ExpertsSpec) -> Pattern:
    """The pattern as CUDA kernels know it.

    Raises:
        UnsupportedSpecError: they do not.
    """
    p = spec.pattern
    if p is None:
        raise UnsupportedSpecError("CUDA kernels multiply packed weights; products of dense ones are Triton's")
    if spec.separate:
        raise UnsupportedSpecError("CUDA kernels read stacks; matrices that lie apart are Triton's")
    return Pattern(p.n, p.m, p.vector, p.group)


def cuda_target(kind: str, capability: tuple[int, int]) -> str:
    """What kernels of a kind are compiled for on a device.

    Raises:
        UnsupportedSpecError: it has none.
    """
    return target_of(capability, kind in _WARPGROUPS)


def weights_place(kind: str) -> str:
    """From where kernels of a kind read weights; see `ProjectionSpec`."""
    return "registers" if kind == "registers" else "shared"


def projection(
    spec: ExpertsSpec, op: str, kind: str, tokens: int, capability: tuple[int, int], bias: bool = False
) -> ProjectionSpec:
    """The CUDA kernel of a projection.

    Raises:
        UnsupportedSpecError: there is none; the message says why.
    """
    target = cuda_target(kind, capability)
    return cuda_spec(
        op, target, cuda_pattern(spec), spec.dtype, spec.activation, spec.gated, bias, tokens, weights_place(kind)
    )
