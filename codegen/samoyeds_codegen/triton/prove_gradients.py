"""Kernels of a backward prove themselves on a device before a block is trained with them, as those of `prove` do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from samoyeds_codegen.triton.gradients import OUTER, backward_kernels, weight_gradient
from samoyeds_codegen.triton.kernel import projection
from samoyeds_codegen.triton.prove import ROUNDING, Load, compare, on, prove
from samoyeds_codegen.triton.sample import EXPERTS, Form
from samoyeds_codegen.triton.spec import ExpertsSpec

Outer = Callable[[Tensor, Tensor, Tensor | None, int, Tensor, Tensor | None, Tensor], None]


@functools.lru_cache(maxsize=256)
def gradients_proven(plain_spec: ExpertsSpec, form: Form, device: torch.device) -> str:
    """As `prove_gradients`; a process asks each device once."""
    return prove_gradients(plain_spec, form, device)


def prove_gradients(
    plain_spec: ExpertsSpec, form: Form, device: torch.device, load: Load = projection, outer: Outer = weight_gradient
) -> str:
    """Why the kernels of a backward are not to be used on a device; an empty text if they may be.

    They are projections without an activation, products by the weights themselves, and sums over slots.

    Args:
        plain_spec: the projections, as `gradients.plain` makes them of a block.
        form: of the weights.
        device: where they lie.
        load: how a kernel is loaded.
        outer: computes the gradient of a weight, or of a bias.
    """
    for each in _forms(plain_spec, form):
        if why := prove(plain_spec, each, device, load, backward_kernels):
            return why
    try:
        with on(device), torch.device("cpu"):
            tried = (_outer(plain_spec.dtype, form.aligned, gathered, flip, device, outer) for gathered, flip in _WAYS)
            return next(filter(None, tried), "")
    except Exception as error:  # whatever Triton, its assembler, the driver or the device raise
        return f"gradient kernels do not run on {device}: {type(error).__name__}: {str(error)[:500]}"


def _forms(spec: ExpertsSpec, form: Form) -> list[Form]:
    """Dense weights also transposed, by which they go back; rows in slot order also for packed ones."""
    whole = replace(form, interleaved=False)
    other = {"transposed": not form.transposed} if spec.pattern is None else {"gathered": True}
    return [whole, replace(whole, **other)]


_WAYS = ((True, False), (True, True), (False, False))
"""Whether the rows are gathered, and whether the gradient is stored transposed."""


def _outer(dtype: str, aligned: bool, gathered: bool, flip: bool, device: torch.device, outer: Outer) -> str:
    """More slots than two tiles, an expert without slots, some of nobody: into a poisoned result with a margin."""
    generator, tile = torch.Generator().manual_seed(0), OUTER["full" if dtype == "float32" else "half"]
    odd, top_k = 16 if aligned else 13, 2 if gathered else 1
    rows, cols, slots = tile.rows + odd, tile.cols + odd, 2 * tile.slots + 14
    ends = [2 * tile.slots + 5, 2 * tile.slots + 5, slots - 3]

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, getattr(torch, dtype))

    grad, x = randn(slots, rows), randn(slots // top_k, cols)
    order_S = torch.randperm(slots, generator=generator).to(device)
    offsets_E = torch.tensor(ends, dtype=torch.int32, device=device)
    grad[ends[-1] :] = float("nan")
    shape = (EXPERTS + 1, 2 * cols, 2 * rows) if flip else (EXPERTS + 1, 2 * rows, 2 * cols)
    whole = x.new_full(shape, float("nan"))
    view = (whole.mT if flip else whole)[:EXPERTS, :rows, :cols]
    outer(grad, x, order_S if gathered else None, top_k, offsets_E, None, view)
    found = view.clone()
    view.fill_(float("nan"))
    if not bool(whole.isnan().all()):
        return f"the gradient of a weight: wrote on {device} what belongs to nobody"
    rows_of = (x[order_S // top_k] if gathered else x).double()
    starts = [0, *ends[:-1]]
    parts = [grad[a:b].double().t() @ rows_of[a:b] for a, b in zip(starts, ends, strict=True)]
    return compare(f"the gradient of a {dtype} weight", found, torch.stack(parts), ROUNDING[dtype])
