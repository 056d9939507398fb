"""A block's kernels prove themselves on a device before they are used there, once a process.

Generated kernels are tested in an interpreter and compiled for devices that are not there. Whether a driver, a version
of Triton and a GPU agree with that is found here: every kernel that may be chosen runs on small problems, into poisoned
outputs, and is compared with plain torch on the same device. This happens when a model is compiled, never in a call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samoyeds_codegen.triton.kernel import Projection, combine, gather, projection, work_list
from samoyeds_codegen.triton.sample import EXPERTS, NOBODYS, Form, problem
from samoyeds_codegen.triton.select import kernels
from samoyeds_codegen.triton.spec import ExpertsSpec, KernelSpec

ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-9, "bfloat16": 2.0**-7}
"""Largest relative error of a result: twice that of its dtype, as Triton's interpreter cuts instead of rounding."""
SUMMING = 2e-5
"""Error of sums in float32, over the largest result."""

Load = Callable[[KernelSpec], Projection]
Kernels = Callable[[ExpertsSpec], Sequence[KernelSpec]]


@functools.lru_cache(maxsize=256)
def proven(spec: ExpertsSpec, form: Form, device: torch.device) -> str:
    """As `prove`; a process asks each device once."""
    return prove(spec, form, device)


def prove(spec: ExpertsSpec, form: Form, device: torch.device, load: Load = projection, of: Kernels = kernels) -> str:
    """Why the kernels of a block are not to be used on a device; an empty text if they may be.

    Args:
        spec: the block.
        form: of its weights.
        device: where they lie.
        load: how a kernel is loaded.
        of: which kernels of the block; by default those of its result.
    """
    try:
        # The problems are made on the CPU, with a generator of their own, whatever the default device is.
        with on(device), torch.device("cpu"):
            asked = [k for k in of(spec) if k.op != "down" or not form.gathered]
            return _plan(device) or next(filter(None, (_project(k, form, device, load) for k in asked)), "")
    except Exception as error:  # whatever Triton, its assembler, the driver or the device raise
        return f"the kernels do not run on {device}: {type(error).__name__}: {str(error)[:500]}"


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The device that kernels are launched on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _project(spec: KernelSpec, form: Form, device: torch.device, load: Load) -> str:
    given = problem(spec, form, device)
    owned, rows = given.expected.shape
    slots = owned + NOBODYS
    # A margin of a tile on all sides, so that a kernel that writes too much shows it instead of breaking something.
    whole = given.x.new_full((slots + spec.tile.slots, rows + spec.outputs), float("nan"))
    tiles = work_list(given.offsets_E, slots, spec.tile.slots)
    load(spec)(given.x, given.order_S, given.top_k, tiles, given.sides, whole[:, :rows])
    found = whole[:owned, :rows].clone()
    whole[:owned, :rows] = float("nan")
    if not bool(whole.isnan().all()):
        return f"{spec}: wrote on {device} what belongs to nobody"
    steps = 1 + 2 * spec.experts.activation.count("to(")  # each rounding step may fall to the other side
    return compare(str(spec), found, given.expected, steps * ROUNDING[spec.experts.dtype])


def _plan(device: torch.device) -> str:
    """The work list, the gather and the weighted sum, against counting and torch."""
    offsets_E = torch.tensor([33, 33, 40], dtype=torch.int32, device=device)
    tiles = work_list(offsets_E, 42, 16)
    expected = [[0, 0, 16, 0], [0, 16, 16, 0], [0, 32, 1, 0], [2, 33, 7, 0]]
    if tiles.tolist() != expected + [[0, 0, 0, 0]] * (tiles.shape[0] - len(expected)):
        return f"the work list on {device} is wrong: {tiles.tolist()}"
    generator = torch.Generator().manual_seed(0)
    y, weights = (torch.randn(*shape, generator=generator).to(device) for shape in ((42, 600), (21, 2)))
    slot_TK = torch.randperm(42, generator=generator).view(21, 2).to(device)
    order_S = slot_TK.flatten().argsort()
    if not torch.equal(gather(y, order_S, 2, offsets_E)[:40], y[order_S[:40] // 2]):
        return f"the gather on {device} is wrong"
    out = torch.full((21, 600), float("nan"), device=device)
    combine(y, slot_TK, weights, offsets_E, out)
    owned = (slot_TK < int(offsets_E[EXPERTS - 1])).unsqueeze(-1)
    weighted = torch.where(owned, y[slot_TK].double() * weights.double().unsqueeze(-1), 0).sum(1)
    return compare("the weighted sum", out, weighted, ROUNDING["float32"])


def compare(name: str, found: Tensor, expected: Tensor, rounding: float) -> str:
    """Why a result is not what was expected; empty if it is, up to rounding and sums in float32."""
    bound = rounding * expected.abs() + SUMMING * expected.abs().max()
    error = (found.double() - expected).abs() / bound.clamp_min(torch.finfo(torch.float64).tiny)
    worst = float(torch.where(error.isnan(), torch.inf, error).max())
    return "" if worst <= 1 else f"{name}: {worst:.3g} times the error that is allowed on {found.device}"
