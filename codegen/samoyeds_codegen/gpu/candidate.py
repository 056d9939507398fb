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

KINDS = ("triton", "mma", "wgmma")
"""Triton for every kind of weights; CUDA with sparse products of warps, or of warpgroups, for packed ones."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a block.

    Attributes:
        kind: one of `KINDS`.
        slots: of one expert, that a program or thread block computes.
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
    for kind in ("mma", "wgmma"):
        if kind in kinds:
            found += [
                Candidate(kind, tokens) for tokens in TILE_TOKENS[kind] if _exists(spec, kind, tokens, capability)
            ]
    return tuple(found)


def _exists(spec: ExpertsSpec, kind: str, tokens: int, capability: tuple[int, int]) -> bool:
    try:
        return all(projection(spec, op, kind, tokens, capability).tokens == tokens for op in ("up", "down"))
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


def projection(
    spec: ExpertsSpec, op: str, kind: str, tokens: int, capability: tuple[int, int], bias: bool = False
) -> ProjectionSpec:
    """The CUDA kernel of a projection.

    Raises:
        UnsupportedSpecError: there is none; the message says why.
    """
    target = target_of(capability, kind == "wgmma")
    return cuda_spec(op, target, cuda_pattern(spec), spec.dtype, spec.activation, spec.gated, bias, tokens)
