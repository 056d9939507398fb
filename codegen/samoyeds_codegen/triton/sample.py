"""Small random problems for a kernel to prove itself on, and what they give in float64 by plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_codegen.triton.matrices import apart
from samoyeds_codegen.triton.operands import DenseSide, PackedSide, Side, Stack
from samoyeds_codegen.triton.spec import KernelSpec, Pattern

EXPERTS = 3
NOBODYS = 3
"""Slots that belong to no expert."""
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Where two values of four columns can be."""


@dataclass(frozen=True)
class Form:
    """What Triton makes another kernel for, of the same text.

    Attributes:
        aligned: whether all sizes are multiples of 16.
        transposed: whether dense weights are stored [E, in, out].
        interleaved: whether rows of gate and up alternate in one dense weight.
        bias: whether there are biases.
        gathered: whether the first projection reads rows in slot order, not tokens by an order.
    """

    aligned: bool = True
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    gathered: bool = False


@dataclass(frozen=True)
class Problem:
    """One projection of few slots, experts and features.

    Attributes:
        x: rows, as the kernel takes them.
        order_S, offsets_E, top_k: the plan: the middle expert has no slots, the last slots are nobody's. No order if
            rows are in slot order.
        sides: the weights.
        expected: float64 [owned slots, rows].
    """

    x: Tensor
    order_S: Tensor | None
    offsets_E: Tensor
    top_k: int
    sides: dict[str, Side]
    expected: Tensor


def problem(spec: KernelSpec, form: Form, device: torch.device) -> Problem:
    """More rows, slots and columns than a tile has, none a whole number of tiles; the same numbers every time."""
    generator = torch.Generator().manual_seed(0)
    odd, pattern = 16 if form.aligned else 13, spec.experts.pattern
    wide = spec.tile.cols if pattern is None else max(spec.tile.cols, pattern.vector)
    slots, cols, rows = spec.tile.slots + 10, 2 * wide + odd, _rows(spec) + odd
    if not form.aligned and pattern is not None:
        rows += -rows % pattern.m
    order_S = torch.randperm(slots, generator=generator)
    owned_slots = slots - NOBODYS
    offsets_E = torch.tensor([slots - 7, slots - 7, owned_slots], dtype=torch.int32)
    top_k = 1 if spec.op == "down" else 2
    inputs = rows if spec.op == "back" else cols
    x = torch.randn(slots // top_k, inputs, generator=generator).to(device, getattr(torch, spec.experts.dtype))
    dense, sides = _sides(spec, form, rows, cols, device, generator)
    slot_rows = x if spec.op == "down" else x[order_S.to(device) // top_k]
    owned = slot_rows.double()[:owned_slots]
    expert_S = torch.searchsorted(offsets_E, torch.arange(owned_slots), right=True).to(device)
    if spec.op == "back":
        results = {"back": _linear(owned, expert_S, dense["back"].mT, None)}
    else:
        results = {name: _linear(owned, expert_S, weight, sides[name].bias) for name, weight in dense.items()}
    x, order = (slot_rows, None) if form.gathered else (x, order_S.to(device))
    return Problem(x, order, offsets_E.to(device), top_k, sides, _activated(spec, results))


def _rows(spec: KernelSpec) -> int:
    """Rows of a weight that are about a tile, or, where they are summed or many share a choice, more than one."""
    pattern = spec.experts.pattern
    if pattern is None:
        return spec.outputs
    if spec.op == "back":
        return 2 * spec.tile.rows // pattern.n * pattern.m
    return max(spec.outputs, min(pattern.m * pattern.group, 2 * spec.outputs))


def _linear(x_SI: Tensor, expert_S: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("si,soi->so", x_SI, weight.double()[expert_S])
    return y if bias is None else y + bias.double()[expert_S]


def _activated(spec: KernelSpec, results: dict[str, Tensor]) -> Tensor:
    if spec.op != "up":
        return results[spec.op]
    names = results if spec.experts.gated else {expr.PLAIN_NAME: results["up"]}
    found: Tensor = expr.evaluate(spec.experts.activation, names)
    return found.double()


def _sides(
    spec: KernelSpec, form: Form, rows: int, cols: int, device: torch.device, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Side]]:
    """A dense weight [E, rows, cols] for each side, and the same as operands of the kernel."""
    dtype, count = getattr(torch, spec.experts.dtype), len(spec.sides)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    bias = randn(count, EXPERTS, rows) if form.bias else [None] * count
    if spec.experts.pattern is not None:
        found = [_packed(spec.experts.pattern, rows, cols, dtype, device, generator) for _ in spec.sides]
        placed = [_placed(side, form.aligned) if spec.experts.separate else side for _, side in found]
        packed = {name: replace(side, bias=b) for name, side, b in zip(spec.sides, placed, bias, strict=True)}
        return {name: weight for name, (weight, _) in zip(spec.sides, found, strict=True)}, dict(packed)
    whole = randn(EXPERTS, count * rows, cols) / cols**0.5
    whole = whole.mT.contiguous().mT if form.transposed else whole
    parts = [whole[:, i::count] for i in range(count)] if form.interleaved else list(whole.chunk(count, dim=1))
    dense = dict(zip(spec.sides, parts, strict=True))
    stored: list[Stack] = list(parts)
    if spec.experts.separate:
        stored = list(apart(*(_matrices(part, form.aligned) for part in parts)))
    return dense, {name: DenseSide(w, b) for name, w, b in zip(spec.sides, stored, bias, strict=True)}


def _placed(side: PackedSide, aligned: bool) -> PackedSide:
    """The same weights as matrices that lie apart."""
    parts = [of for of in side.stored.values() if isinstance(of, Tensor)]
    found = dict(zip(side.stored, apart(*(_matrices(of, aligned) for of in parts)), strict=True))
    return replace(side, values=found["values"], metadata=found["metadata"], selection=found.get("selection"))


def _matrices(stack: Tensor, aligned: bool) -> list[Tensor]:
    return list(stack.unbind()) if aligned else _scattered(stack)


def _scattered(stack: Tensor) -> list[Tensor]:
    """Its matrices, in memory of their own, the last one first and with odd gaps; strides stay what they are."""
    experts, (rows, cols) = stack.shape[0], stack.stride()[1:]
    size = 1 + sum((n - 1) * step for n, step in zip(stack.shape[1:], (rows, cols), strict=True))
    memory = stack.new_empty(experts * (size + 3))
    found = [memory.as_strided(stack.shape[1:], (rows, cols), e * (size + 3) + 1) for e in reversed(range(experts))]
    for mine, given in zip(found, stack, strict=True):
        mine.copy_(given)
    return found


def _packed(
    pattern: Pattern, rows: int, cols: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, PackedSide]:
    """A random weight with the pattern, dense and packed; padding is zero, as packers leave it.

    The second vector keeps sub-rows that the first one does not, so that no row of gates or ups is zero where a choice
    holds for many blocks: a product of the two could be zero everywhere, and prove nothing.
    """
    n, m, vector, group = pattern.n, pattern.m, pattern.vector, pattern.group
    groups, vectors = -(-rows // (m * group)), -(-cols // vector)
    condensed, width = groups * group * n, vectors * vector
    dense_cols = torch.arange(width) < cols
    pair = torch.randint(len(PAIRS), (EXPERTS, condensed, width // 4), generator=generator)
    position = torch.tensor(PAIRS)[pair]  # [E, R, C / 4, 2]
    live = dense_cols.view(-1, 4)[torch.arange(width // 4)[:, None], position]
    values = torch.randn(*position.shape, generator=generator).mul(live).div(cols**0.5).to(dtype)
    words = ((position[..., 0] | position[..., 1] << 2).unflatten(-1, (-1, 4)) << torch.arange(0, 16, 4)).sum(-1)
    shuffled = torch.rand(EXPERTS, groups, m, vectors, generator=generator).argsort(2)
    shuffled[..., 1:2] = shuffled[..., :1].roll(n, 2)
    order = shuffled[:, :, :n].sort(2).values
    whole = torch.zeros(EXPERTS, condensed, width // 4, 4, dtype=dtype).scatter_(-1, position, values).flatten(2)
    block = torch.zeros(EXPERTS, groups, group, m, vectors, vector, dtype=dtype)
    chosen = order[:, :, None, :, :, None].expand(-1, -1, group, -1, -1, vector)
    block.scatter_(3, chosen, whole.view(EXPERTS, groups, group, n, vectors, vector))
    dense = block.reshape(EXPERTS, groups * group * m, width)[:, :rows, :cols].to(device)
    selection = order.flatten(1, 2).to(device, torch.uint8) if pattern.selects else None
    side = PackedSide(values.flatten(2).to(device), words.to(torch.int16).to(device), selection, pattern, rows)
    return dense, side
