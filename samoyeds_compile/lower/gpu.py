"""Whether a block on a CUDA device runs as generated kernels, which have to prove themselves there first."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from samoyeds_codegen.cuda.emit import emit as emit_cuda
from samoyeds_codegen.cuda.nvrtc import compile_log
from samoyeds_codegen.cuda.spec import VARIANTS
from samoyeds_codegen.errors import KernelError
from samoyeds_codegen.gpu.apart import proven_apart
from samoyeds_codegen.gpu.candidate import KINDS, TOKENS, candidates, projection, too_many
from samoyeds_codegen.gpu.choose import TUNED, choose
from samoyeds_codegen.gpu.cost import Block
from samoyeds_codegen.gpu.device import Device, device_of
from samoyeds_codegen.gpu.results import of_block
from samoyeds_codegen.gpu.tune import tune
from samoyeds_codegen.triton.emit import emit, emit_gradients
from samoyeds_codegen.triton.gradients import backward_kernels, plain
from samoyeds_codegen.triton.kernel import interprets
from samoyeds_codegen.triton.prove import proven
from samoyeds_codegen.triton.prove_gradients import gradients_proven
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.select import kernels
from samoyeds_codegen.triton.spec import ExpertsSpec
from samoyeds_compile.ops.experts_gpu import gpu_spec, weight_form
from samoyeds_compile.ops.operands import in_width, num_experts, out_width

NAMES = {
    "triton": "Triton",
    "mma": "CUDA mma.sp",
    **{kind: f"CUDA wgmma.sp{variant}" for kind, variant in VARIANTS.items()},
}
SAID = (1, 64, 4096)
"""Numbers of tokens for which the report says what is taken, where their number is a symbol."""


@dataclass(frozen=True)
class GpuKernels:
    """The kernels of a block.

    Attributes:
        kinds: what may be taken, as `gpu_experts` wants it; empty if there are none.
        text: what the report says of them, or why there are none.
        texts: gives what was generated, by names of files.
        gathers: the layouts, as `gpu_experts` wants them.
    """

    kinds: str
    text: str
    texts: Callable[[], Mapping[str, str]] = dict
    gathers: int = 0


def switched_off(packed: bool, triton: bool | None) -> str | None:
    """Why the option ``triton`` leaves a block on a CUDA device without kernels; None if it does not."""
    if triton is False:
        return "kernels for CUDA devices are switched off (triton=False)"
    if triton is None and not packed:
        return "Triton kernels for dense weights were not timed on a GPU yet; triton=True takes them"
    return None


def gpu_kernels(
    expert_ids_TK: torch.Tensor,
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
    measure: bool = False,
    gathers: int = 0,
) -> GpuKernels:
    """The kernels of a block on the device of its weights.

    The first time that a process asks, kernels are compiled and run on small problems on the device, and compared with
    plain torch; the answer is kept. Where gradients are enabled, so do those of the backward. CUDA kernels do that in
    a process of their own.

    Args:
        expert_ids_TK: of which only the shape counts; T may be symbolic.
        gate, up, down: weights of the block, or fakes of them.
        activation, gate_up_layout, weight_layout, weighting, compute_dtype: as `moe_experts` takes them.
        bias: whether any projection has a bias.
        measure: whether to measure candidates, unless that was done on this device before.
        gathers: the plan of layouts; dropped if kernels refuse what it asks for.
    """
    spec = gpu_spec(gate, up, down, activation, gate_up_layout, weight_layout, weighting, compute_dtype)
    if isinstance(spec, str):
        return GpuKernels("", spec)
    trains = torch.is_grad_enabled()
    if trains and spec.pattern is not None and any(w.requires_grad for w in (*gate, *up, *down)):
        return GpuKernels("", "gradients of packed weights are wanted, which kernels do not compute; freeze them")
    device, in_out = up[0].device, weight_layout == "in_out"
    form = weight_form(gate, up, down, gate_up_layout, weight_layout, bias)
    block = Block(num_experts(up), out_width(down, in_out), in_width(down, in_out))
    kinds, refused = usable(spec, form, block, expert_ids_TK, device, measure, trains)
    numbers, calls = device_of(device), _slots(expert_ids_TK)
    dropped = _gathered_refusal(spec, form, device) if gathers and "triton" in kinds else ""
    why = "; ".join(f"{NAMES[kind]} kernels were refused: {reason}" for kind, reason in refused.items() if reason)
    if not kinds:
        return GpuKernels("", why)
    allowed = " ".join(kinds)
    taken = ", ".join(f"{choose(spec, block, s, numbers, allowed)} for {t} tokens" for t, s in calls.items())
    block_is = f"{spec} and its gradients" if trains else str(spec)
    text = f"{' and '.join(NAMES[k] for k in kinds if k != TUNED)} kernels of {block_is}: {taken}"
    text += f"; rows are gathered while they are loaded, as the other way was refused: {dropped}" if dropped else ""
    shown = f"{text}; {why}" if spec.pattern is not None else text
    texts = partial(_texts, spec, block, tuple(kinds), numbers, bias, trains)
    return GpuKernels(allowed, shown.removesuffix("; "), texts, 0 if dropped else gathers)


def usable(
    spec: ExpertsSpec,
    form: Form,
    block: Block,
    expert_ids_TK: torch.Tensor,
    device: torch.device,
    measure: bool,
    trains: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """Kinds of kernels that have proven themselves, and measured if that is asked for; and why others have not."""
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        refused = {"triton": _triton_refusal(spec, form, device, trains)}
        refused |= _cuda_refusals(spec, form, block, device, refused["triton"] if trains else "")
        kinds = [kind for kind in KINDS if not refused[kind]]
        if measure and kinds:
            tune(spec, block, list(_slots(expert_ids_TK).values()), device, device_of(device), tuple(kinds))
            kinds.append(TUNED)
    return kinds, refused


def _slots(expert_ids_TK: torch.Tensor) -> dict[int, int]:
    """Slots by number of tokens: that of this graph, or some where it is a symbol."""
    tokens, top_k = expert_ids_TK.shape
    counts = (tokens,) if isinstance(tokens, int) else SAID
    return {count: count * int(top_k) for count in counts}


def _cuda_refusals(
    spec: ExpertsSpec, form: Form, block: Block, device: torch.device, gradients: str
) -> dict[str, str]:  # fmt: skip
    """Why CUDA kernels of each kind are not used; empty if they are. Kinds are proven at a time, in processes."""
    kinds, numbers = [kind for kind in KINDS if kind != "triton"], device_of(device)

    def refusal(kind: str) -> str:
        if device.type != "cuda":
            return f"they do not run on {device}"
        if gradients:
            return f"their gradients are Triton kernels: {gradients}"
        return proven_apart(spec, kind, form, device, numbers)

    with ThreadPoolExecutor(len(kinds)) as pool:
        found = pool.map(lambda kind: too_many(kind, block.experts) or refusal(kind), kinds)
        return dict(zip(kinds, found, strict=True))


def _triton_refusal(spec: ExpertsSpec, form: Form, device: torch.device, trains: bool) -> str:
    try:
        interpreted = interprets()
    except KernelError as error:
        return f"{type(error).__name__}: {error}"
    if device.type != "cuda" and not interpreted:
        return f"they do not run on {device}"
    return proven(spec, form, device) or (gradients_proven(plain(spec), form, device) if trains else "")


def _gathered_refusal(spec: ExpertsSpec, form: Form, device: torch.device) -> str:
    """Why kernels of Triton do not read rows that were gathered before; empty if they do."""
    with unset_fake_temporarily(), torch.inference_mode(False), torch.no_grad():
        return _triton_refusal(spec, replace(form, gathered=True), device, False)


def _texts(
    spec: ExpertsSpec, block: Block, kinds: tuple[str, ...], device: Device, bias: bool, trains: bool
) -> dict[str, str]:
    """All kernels that a call may choose with logs of those that were compiled, and times, by names of files."""
    found = {}
    if "triton" in kinds:
        found = {f"triton_{kernel.op}_{number}.py": emit(kernel) for number, kernel in enumerate(kernels(spec))}
        if trains:
            backward = enumerate(backward_kernels(plain(spec)))
            found |= {f"triton_backward_{kernel.op}_{number}.py": emit(kernel) for number, kernel in backward}
            found["triton_backward_weights.py"] = emit_gradients()
    for each in candidates(spec, tuple(k for k in kinds if k in TOKENS), device.capability):
        for op in ("up", "down"):
            kernel = projection(spec, op, each.kind, each.slots, device.capability, bias)
            name, text = f"{each.kind}_{op}_{each.slots}", emit_cuda(kernel)
            found |= {f"{name}.cu": text, f"{name}.log": compile_log(text, kernel.target)}
    if TUNED in kinds:
        found["tuned.json"] = json.dumps(of_block(spec, block, device), indent=1)
    return {name: text for name, text in found.items() if text}
