"""CUDA kernels prove themselves on a device: small problems, poisoned results, float64; see also `triton.prove`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from samoyeds_codegen.cuda.block import Plan, combine, plan_routing, project, readable
from samoyeds_codegen.cuda.launch import Launch, target_of
from samoyeds_codegen.cuda.launch import run as launch_all
from samoyeds_codegen.cuda.operands import Projection
from samoyeds_codegen.cuda.spec import ProjectionSpec, RouteSpec
from samoyeds_codegen.gpu.candidate import candidates
from samoyeds_codegen.gpu.candidate import projection as cuda_spec
from samoyeds_codegen.gpu.weights import matrix
from samoyeds_codegen.triton.prove import ROUNDING, compare, on
from samoyeds_codegen.triton.sample import Form, Problem, problem
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec, Tile

Run = Callable[[Iterable[Launch], torch.device], None]
POISON = 255
"""Of every byte: not a number, or -1."""


def prove(
    spec: ExpertsSpec, kind: str, form: Form, device: torch.device, capability: tuple[int, int], run: Run = launch_all
) -> str:
    """Why the kernels of a kind are not to be used for a block on a device; an empty text if they may be.

    Args:
        spec: the block.
        kind: one of `candidate.KINDS` that is CUDA's.
        form: of its weights.
        device: where they lie.
        capability: of the device.
        run: what launches.
    """
    found = candidates(spec, (kind,), capability)
    if not found:
        return "there is no such kernel for this block and device"
    try:
        with on(device), torch.device("cpu"):  # problems are made on the CPU
            tried = (_project(spec, c.kind, op, c.slots, form, device, capability, run)
                     for c in found for op in ("up", "down"))  # fmt: skip
            target = target_of(capability)
            return next(filter(None, tried), "") or _combine(spec, target, device, run) or _route(target, device, run)
    except Exception as error:  # whatever the compiler or the driver raise
        return f"the kernels do not run on {device}: {type(error).__name__}: {str(error)[:500]}"


def _project(
    spec: ExpertsSpec, kind: str, op: str, tokens: int, form: Form, device: torch.device,
    capability: tuple[int, int], run: Run,
) -> str:  # fmt: skip
    kernel = cuda_spec(spec, op, kind, tokens, capability, form.bias)
    given = problem(KernelSpec(op, spec, _sampled(kernel)), form, device)
    assert given.order_S is not None  # these kernels have no other form
    owned, rows = given.expected.shape
    weights = _weights(given, rows, op == "up" and spec.gated)
    launch, out = project(kernel, weights, readable(given.x), _plan(given, tokens), processors=2)
    out.view(torch.uint8).fill_(POISON)
    run((launch,), device)
    if not bool(out[owned:].isnan().all()):
        return f"{kernel}: wrote on {device} what belongs to nobody"
    steps = 1 + 2 * spec.activation.count("to(")
    return compare(str(kernel), out[:owned, :rows], given.expected, steps * ROUNDING[spec.dtype])


def _sampled(kernel: ProjectionSpec) -> Tile:
    """A problem for a tile of Triton's is of the right size for one of these, too: rows for all blocks of a cluster."""
    vector = kernel.pattern.vector if kernel.pattern.selects else 128
    return Tile(max(32 * kernel.row_tiles_together, 64), max(kernel.slots, 16), vector, 4, 2)


def _plan(given: Problem, tokens: int) -> Plan:
    """The plan of a problem, with tiles that are listed on the host."""
    assert given.order_S is not None  # these kernels have no other form
    ends = given.offsets_E.tolist()
    tiles = [
        [expert, first, min(tokens, end - first), 0]
        for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        for first in range(start, end, tokens)
    ]
    like = given.offsets_E.new_tensor
    return Plan(
        given.order_S, given.order_S.new_empty(0, given.top_k), given.offsets_E, like(tiles), like([len(tiles)])
    )


def _weights(given: Problem, rows: int, gated: bool) -> Projection:
    sides = [given.sides[name] for name in (("gate", "up") if gated else tuple(given.sides))]
    return Projection(rows, given.x.shape[1], *map(matrix, sides))


def _combine(spec: ExpertsSpec, target: str, device: torch.device, run: Run) -> str:
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, spec.dtype)
    y = torch.randn(42, 1032, generator=generator).to(device, dtype)
    weights = torch.rand(21, 2, generator=generator).to(device)
    slot_TK = torch.randperm(42, generator=generator).view(21, 2).to(device)
    offsets_E = torch.tensor([33, 33, 40], dtype=torch.int32, device=device)
    out: Tensor = torch.full((21, 1030), float("nan"), device=device)
    plan = Plan(slot_TK.flatten(), slot_TK, offsets_E, offsets_E, offsets_E)
    run((combine(target, y, plan, weights, out),), device)
    owned = (slot_TK < 40).unsqueeze(-1)
    expected = torch.where(owned, y[slot_TK].double() * weights.double().unsqueeze(-1), 0).sum(1)[:, :1030]
    return compare("the weighted sum", out, expected, ROUNDING["float32"])


def _route(target: str, device: torch.device, run: Run) -> str:
    """Against a stable sort; some ids are no experts, and more slots than threads."""
    experts, tile = 37, 16
    ids = torch.randint(-2, experts + 2, (700, 2), generator=torch.Generator().manual_seed(0)).to(device)
    launch, plan = plan_routing(RouteSpec(target, experts, tile), ids)
    for written in vars(plan).values():
        written.view(torch.uint8).fill_(POISON)
    run((launch,), device)
    flat = torch.where((ids < 0) | (ids >= experts), experts, ids).flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    tiles = plan.tiles[: int(plan.count)]
    right = (
        torch.equal(plan.order_S, order)
        and torch.equal(plan.slot_TK.flatten()[order], torch.arange(len(order), device=device))
        and torch.equal(plan.offsets_E.long(), counts.cumsum(0))
        and torch.equal(torch.bincount(tiles[:, 0].long(), tiles[:, 2], experts).long(), counts)
        and int(plan.count) == int((-(-counts // tile)).sum())
    )
    return "" if right else f"the routing plan on {device} is wrong"
