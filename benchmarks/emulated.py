"""How far the result of a generated kernel is from the right one, its text run by the emulator on the CPU."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from samoyeds_codegen import emulate, expr
from samoyeds_codegen.cuda.arguments import arguments_of
from samoyeds_codegen.cuda.block import Plan, combine, plan_routing, project
from samoyeds_codegen.cuda.emit import ENTRY, emit
from samoyeds_codegen.cuda.launch import Launch
from samoyeds_codegen.cuda.operands import Matrix, Projection
from samoyeds_codegen.cuda.spec import CombineSpec, KernelSpec, ProjectionSpec, RouteSpec
from samoyeds_compile.ops.route import route
from samoyeds_compile.sparsity import SparsityConfig, best_mask
from samoyeds_compile.sparsity.pack import pack as pack_canonical

EXPERTS, FEATURES, COLUMNS, SLOTS = 2, 72, 200, 19


WRITTEN = ("Element*", "Result*", "Tile*", "int32_t*", "int64_t*")
"""Types of arguments that kernels write."""


def error_of(spec: KernelSpec) -> float:
    """Of sums, relative to the norm of the result in float64; of a routing plan, the share of numbers that are wrong.

    Raises:
        EmulationError: the kernel does something wrong.
    """
    if isinstance(spec, ProjectionSpec):
        return _projection_error(spec)
    return _route_error(spec) if isinstance(spec, RouteSpec) else _combine_error(spec)


def _route_error(spec: RouteSpec) -> float:
    """More slots of the first expert than a tile has, experts without slots, and ids that are no expert."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, spec.experts + 1, (60, 2), generator=generator)
    ids[:SLOTS] = 0
    launch, plan = plan_routing(spec, ids.to(getattr(torch, spec.ids)))
    _emulate(launch)
    expected = route(ids, spec.experts)
    tiles, count = _tiles(spec, expected.offsets_E)
    pairs = [
        (plan.order_S, expected.order_S), (plan.slot_TK, expected.slot_TK), (plan.offsets_E, expected.offsets_E),
        (plan.count, count), (plan.tiles[: len(tiles), :3], tiles[:, :3]),
    ]  # fmt: skip
    wrong = sum(int((found != right).sum()) for found, right in pairs)
    return wrong / sum(right.numel() for _, right in pairs)


def _combine_error(spec: CombineSpec) -> float:
    """Rows of nobody are not a number."""
    generator, top_k = torch.Generator().manual_seed(0), 2
    plan = route(torch.randint(-1, EXPERTS, (SLOTS, top_k), generator=generator), EXPERTS)
    y_SH = torch.randn(SLOTS * top_k, COLUMNS, generator=generator).to(getattr(torch, spec.dtype))
    y_SH[int(plan.offsets_E[-1]) :] = float("nan")
    weights = torch.rand(SLOTS, top_k, generator=generator).to(getattr(torch, spec.weights))
    out = torch.full((SLOTS, COLUMNS), float("nan"), dtype=getattr(torch, spec.out))
    tiled = Plan(plan.order_S, plan.slot_TK, plan.offsets_E, *(torch.zeros(1, dtype=torch.int32) for _ in range(2)))
    _emulate(combine(spec.target, y_SH, tiled, weights, out))
    owned = (plan.slot_TK < plan.offsets_E[-1]).unsqueeze(-1)
    expected = torch.where(owned, y_SH[plan.slot_TK].double() * weights.double().unsqueeze(-1), 0).sum(1)
    return float((out.double() - expected).norm() / expected.norm())


def _projection_error(spec: ProjectionSpec) -> float:
    generator = torch.Generator().manual_seed(0)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    names = ("gate", "up") if spec.gated else ("x",)
    dense = {name: _weight(spec, dtype, generator) for name in names}
    bias = {n: torch.randn(EXPERTS, FEATURES, generator=generator).to(dtype) for n in names} if spec.bias else {}
    x = torch.randn(SLOTS, COLUMNS, generator=generator).to(dtype)
    plan = route(torch.randint(EXPERTS, (SLOTS, 1), generator=generator), EXPERTS)
    tiled = Plan(plan.order_S, plan.slot_TK, plan.offsets_E, *_tiles(spec, plan.offsets_E))
    launch, out = project(spec, _packed(spec, dense, bias), x, tiled, processors=2)
    _emulate(launch)
    expected = _expected(spec, dense, bias, x if spec.op == "down" else x[plan.order_S], plan.expert_S)
    return float((out[:, :FEATURES].double() - expected).norm() / expected.norm())


def _config(spec: ProjectionSpec) -> SparsityConfig:
    pattern = spec.pattern
    return SparsityConfig(pattern.n, pattern.m, pattern.vector, group=pattern.group)


def _weight(spec: ProjectionSpec, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    weight = torch.randn(EXPERTS, FEATURES, COLUMNS, generator=generator).to(dtype)
    return weight * best_mask(weight.abs(), _config(spec))


def _packed(spec: ProjectionSpec, dense: dict[str, Tensor], bias: dict[str, Tensor]) -> Projection:
    found = []
    for name, weight in dense.items():
        packed = pack_canonical(weight, _config(spec))
        assert packed.metadata is not None
        found.append(Matrix(packed.values, packed.metadata, packed.selection, 0, bias.get(name)))
    return Projection(FEATURES, COLUMNS, *found)


def _tiles(spec: ProjectionSpec | RouteSpec, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    ends, size = offsets_E.tolist(), spec.slots if isinstance(spec, ProjectionSpec) else spec.tokens
    tiles = [
        [expert, first, min(size, end - first), 0]
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        for first in range(start, end, size)
    ]
    return torch.tensor(tiles, dtype=torch.int32), torch.tensor([len(tiles)], dtype=torch.int32)


def _emulate(launch: Launch) -> None:
    values: list[emulate.Argument] = []
    for kind, name, _ in arguments_of(launch.spec).fields:
        value = launch.arguments[name]
        if kind in WRITTEN:
            assert isinstance(value, Tensor)
            value = emulate.Output(value)
        values.append(ctypes.c_int64(value) if kind == "int64_t" else value)
    spec = launch.spec
    shape = (launch.grid, (spec.threads,), spec.shared_bytes)
    emulate.run(emit(spec), f"samoyeds::{ENTRY}", *shape, values, cluster=spec.cluster)


def _expected(
    spec: ProjectionSpec, dense: dict[str, Tensor], bias: dict[str, Tensor], rows: Tensor, expert_S: Tensor
) -> Tensor:
    inputs = {}
    for name, weight in dense.items():
        product = torch.einsum("sfc,sc->sf", weight[expert_S].double(), rows.double())
        inputs[name] = product + (bias[name][expert_S].double() if bias else 0.0)
    return expr.evaluate(spec.activation, inputs)
