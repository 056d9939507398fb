"""Random weights and tokens of a block's sizes, to measure its projections by any candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from samoyeds_codegen.cuda.block import Experts, Routing, plan_block
from samoyeds_codegen.cuda.launch import run
from samoyeds_codegen.cuda.operands import Projection
from samoyeds_codegen.gpu.candidate import Candidate, cuda_pattern, cuda_target, variant_of
from samoyeds_codegen.gpu.cost import Block
from samoyeds_codegen.gpu.device import device_of
from samoyeds_codegen.gpu.weights import matrix
from samoyeds_codegen.triton.kernel import combine, projection, work_list
from samoyeds_codegen.triton.matrices import apart
from samoyeds_codegen.triton.operands import DenseSide, PackedSide, Side, Stack
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Pattern


@dataclass(frozen=True)
class Tokens:
    """Slots of random routing, one choice a token."""

    x: Tensor
    ids_TK: Tensor
    order_S: Tensor
    offsets_E: Tensor
    weights_TK: Tensor


class Trial:
    """A block with random weights on a device.

    Args:
        spec: the block.
        block: its sizes.
        device: where.
    """

    def __init__(self, spec: ExpertsSpec, block: Block, device: torch.device) -> None:
        self.spec, self.block, self.device = spec, block, device
        names = ("gate", "up") if spec.gated else ("up",)
        self.sides = {name: self._side(block.width, block.hidden) for name in names}
        self.down = self._side(block.hidden, block.width)

    def call(self, candidate: Candidate, slots: int) -> Callable[[], object]:
        """A function that computes the block by a candidate."""
        tokens = self._tokens(slots)
        if candidate.tiles is None:
            return lambda: self._by_cuda(candidate, tokens)
        return lambda: self._by_triton(candidate, tokens)

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.spec.dtype)
        return found

    def _side(self, rows: int, cols: int) -> Side:
        experts, pattern = self.block.experts, self.spec.pattern
        if pattern is None:
            stack = torch.empty(experts, rows, cols, dtype=self._dtype, device=self.device).normal_()
            return DenseSide(apart([stack])[0] if self.spec.separate else stack)
        return self._packed(pattern, experts, rows, cols)

    def _packed(self, p: Pattern, experts: int, rows: int, cols: int) -> PackedSide:
        groups, vectors = -(-rows // (p.m * p.group)), -(-cols // p.vector)
        condensed, width = groups * p.group * p.n, vectors * p.vector
        values = torch.empty(experts, condensed, width // 2, dtype=self._dtype, device=self.device).normal_()
        metadata = torch.full((experts, condensed, width // 16), 0x4444, dtype=torch.int16, device=self.device)
        parts = {"values": values, "metadata": metadata}
        if p.selects:
            size = (experts, groups * p.n, vectors)
            first = torch.arange(p.n, dtype=torch.uint8, device=self.device).repeat(groups)[:, None]
            parts["selection"] = first + torch.randint(p.m - p.n + 1, size, dtype=torch.uint8, device=self.device)
        found: dict[str, Stack] = dict(parts)
        if self.spec.separate:
            found = dict(zip(parts, apart(*([of] for of in parts.values())), strict=True))
        return PackedSide(found["values"], found["metadata"], found.get("selection"), p, rows)

    def _tokens(self, slots: int) -> Tokens:
        unsorted = torch.randint(self.block.experts, (slots,), device=self.device)
        ids, order = unsorted.sort()
        ends = torch.searchsorted(ids, torch.arange(self.block.experts, device=self.device), right=True, out_int32=True)
        x = torch.randn(slots, self.block.hidden, device=self.device).to(self._dtype)
        return Tokens(x, unsorted.view(-1, 1), order, ends, torch.ones(slots, 1, device=self.device))

    def _by_triton(self, candidate: Candidate, tokens: Tokens) -> Tensor:
        tiles, slots = candidate.tiles, tokens.order_S.shape[0]
        assert tiles is not None
        h, y = tokens.x.new_empty(slots, self.block.width), torch.empty_like(tokens.x)
        work = work_list(tokens.offsets_E, slots, tiles.slots)
        projection(KernelSpec("up", self.spec, tiles.up))(tokens.x, tokens.order_S, 1, work, self.sides, h)
        projection(KernelSpec("down", self.spec, tiles.down))(h, tokens.order_S, 1, work, {"down": self.down}, y)
        out = torch.empty_like(y)
        combine(y, tokens.order_S.view(-1, 1), tokens.weights_TK, tokens.offsets_E, out)
        return out

    def _by_cuda(self, candidate: Candidate, tokens: Tokens) -> Tensor:
        up = Projection(self.block.width, self.block.hidden, *map(matrix, self.sides.values()))
        down = Projection(self.block.hidden, self.block.width, matrix(self.down))
        experts = Experts(cuda_pattern(self.spec), self.spec.activation, self.spec.gated, up, down)
        routing = Routing(tokens.ids_TK, tokens.weights_TK)
        numbers = device_of(self.device)
        target = cuda_target(candidate.kind, numbers.capability)
        block = plan_block(
            tokens.x, experts, routing, target, numbers.processors, self._dtype, candidate.slots,
            variant_of(candidate.kind),
        )  # fmt: skip
        run(block.launches, self.device)
        return block.out_TH
