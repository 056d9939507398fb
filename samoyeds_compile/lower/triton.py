"""Whether a block on a CUDA device runs as Triton kernels, which have to prove themselves there first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from samoyeds_codegen.errors import KernelError
from samoyeds_codegen.triton.emit import emit
from samoyeds_codegen.triton.kernel import interprets
from samoyeds_codegen.triton.prove import proven
from samoyeds_codegen.triton.select import kernels
from samoyeds_codegen.triton.spec import ExpertsSpec
from samoyeds_compile.ops.experts_triton import triton_spec, weight_form


def switched_off(packed: bool, triton: bool | None) -> str | None:
    """Why the option ``triton`` leaves a block on a CUDA device without kernels; None if it does not."""
    if triton is False:
        return "Triton kernels are switched off (triton=False)"
    if triton is None and not packed:
        return "Triton kernels for dense weights were not timed on a GPU yet; triton=True takes them"
    return None


def triton_kernel(
    gate: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
    compute_dtype: torch.dtype,
    *,
    bias: bool,
) -> tuple[str | None, str, Callable[[], Mapping[str, str]]]:
    """What the report calls the kernels of a block, or None; why there are none; and what gives their texts.

    Asked for the first time in a process, the kernels of a specification are compiled and run on small problems on the
    device of the weights, and compared with plain torch; the answer is kept.

    Args:
        gate, up, down: weights of the block, or fakes of them.
        activation, gate_up_layout, weight_layout, weighting, compute_dtype: as `moe_experts` takes them.
        bias: whether any projection has a bias.
    """
    spec = triton_spec(gate, up, down, activation, gate_up_layout, weight_layout, weighting, compute_dtype)
    if isinstance(spec, str):
        return None, spec, dict
    if torch.is_grad_enabled():
        return None, "gradients are enabled; compile and run under torch.no_grad()", dict
    try:
        interpreted = interprets()
    except KernelError as error:
        return None, f"{type(error).__name__}: {error}", dict
    device = up[0].device
    if device.type != "cuda" and not interpreted:
        return None, f"Triton kernels do not run on {device}", dict
    form = weight_form(gate, up, down, gate_up_layout, weight_layout, bias)
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        reason = proven(spec, form, device)
    if reason:
        return None, f"Triton kernels were refused: {reason}", dict
    return f"Triton kernels of {spec}", "", partial(_texts, spec)


def _texts(spec: ExpertsSpec) -> dict[str, str]:
    """All kernels that a call may choose, by names of files."""
    return {f"triton_{kernel.op}_{number}.py": emit(kernel) for number, kernel in enumerate(kernels(spec))}
