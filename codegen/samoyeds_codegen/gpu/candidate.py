"""What may compute a block of experts on a device: a kind of kernel and its tile."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from samoyeds_codegen.cuda.block import choose as cuda_spec
from samoyeds_codegen.cuda.launch import target_of
from samoyeds_codegen.cuda.pattern import Pattern
from samoyeds_codegen.cuda.spec import ALONE, MOST_EXPERTS, TILE_TOKENS, VARIANTS, ProjectionSpec, Variant
from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.triton.select import Tiles
from samoyeds_codegen.triton.select import candidates as triton_tiles
from samoyeds_codegen.triton.spec import ExpertsSpec

KINDS = ("triton", "mma", *VARIANTS)
"""Triton for every kind of weights; for packed ones CUDA with sparse products of warps, or of warpgroups, alone, in
clusters of two blocks that share weights or tokens, or with weights from registers."""
TOKENS = {"mma": TILE_TOKENS["mma"], **dict.fromkeys(VARIANTS, TILE_TOKENS["wgmma"])}
"""Of one expert, that a thread block of CUDA may compute. All variants but the first one are for many: they relieve
shared memory and the cache, which few tokens do not keep busy, so the largest tile that exists is enough."""


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
    for kind in (kind for kind in TOKENS if kind in kinds):
        slots = [count for tokens in TOKENS[kind] if (count := _slots(spec, kind, tokens, capability))]
        found += [Candidate(kind, count) for count in (slots if variant_of(kind) == ALONE else slots[-1:])]
    return tuple(found)


def _slots(spec: ExpertsSpec, kind: str, tokens: int, capability: tuple[int, int]) -> int:
    """Of one expert, that a block or cluster computes with tiles of so many tokens; 0 if there is no such kernel."""
    slots = tokens * (2 if variant_of(kind).shares_weights else 1)
    try:
        found = [projection(spec, op, kind, slots, capability) for op in ("up", "down")]
    except UnsupportedSpecError:
        return 0
    return slots if all(kernel.tokens == tokens for kernel in found) else 0


def too_many(kind: str, experts: int) -> str:
    """Why kernels of a kind do not compute a block of so many experts; empty if they do."""
    if kind == "triton" or experts <= MOST_EXPERTS:
        return ""
    return f"their routing plan is for at most {MOST_EXPERTS} experts, not {experts}"


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
    return target_of(capability, kind in VARIANTS)


def variant_of(kind: str) -> Variant:
    """How kernels of a kind come by what they multiply."""
    return VARIANTS.get(kind, ALONE)


def projection(
    spec: ExpertsSpec, op: str, kind: str, tokens: int, capability: tuple[int, int], bias: bool = False
) -> ProjectionSpec:
    """The CUDA kernel of a projection.

    Raises:
        UnsupportedSpecError: there is none; the message says why.
    """
    target = cuda_target(kind, capability)
    return cuda_spec(
        op, target, cuda_pattern(spec), spec.dtype, spec.activation, spec.gated, bias, tokens, variant_of(kind)
    )
