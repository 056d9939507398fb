"""Whether a block runs as one kernel, which, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samoyeds_codegen.cpp.kernel import experts_kernel
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.lower.triton import triton_kernel
from samoyeds_compile.ops.experts_dense import dense_spec
from samoyeds_compile.ops.experts_packed import kernel_spec
from samoyeds_compile.sparsity.tensor import PackedTensor


@dataclass(frozen=True)
class KernelChoice:
    """How a block is computed.

    Attributes:
        packed: whether its weights are packed.
        kernel: what the report calls the kernel; None if there is none.
        reason: why there is none.
        triton: whether the kernel is one for CUDA devices.
    """

    packed: bool
    kernel: str | None
    reason: str = ""
    triton: bool = False

    @property
    def op(self) -> torch._ops.OpOverload | None:
        """What computes the block with the kernel, in place of the canonical op; None without a kernel."""
        ops = torch.ops.samoyeds
        if self.kernel is None:
            return None
        if self.triton:
            return ops.experts_triton.default
        return ops.experts_packed.default if self.packed else ops.experts_dense.default

    def __str__(self) -> str:
        """For the report."""
        instead = "weights are unpacked in every call" if self.packed else "products are PyTorch's"
        return self.kernel or f"without a kernel, {instead}: {self.reason}"


def choose_kernel(
    gate: Sequence[torch.Tensor], up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], *options: Any,
    bias: bool = False,
) -> KernelChoice:  # fmt: skip
    """Compile the kernel of a block, unless the cache has it, and say how the block is computed.

    Args:
        gate, up, down: its weights, or fakes of them.
        options: what else `kernel_spec`, `dense_spec` and `triton_spec` take.
        bias: whether any projection has a bias.
    """
    packed = any(isinstance(weight, PackedTensor) for weight in (*gate, *up, *down))
    if up[0].device.type == "cuda":
        return KernelChoice(packed, *triton_kernel(gate, up, down, *options, bias=bias), triton=True)
    spec = (kernel_spec if packed else dense_spec)(gate, up, down, *options)
    if isinstance(spec, str):
        return KernelChoice(packed, None, spec)
    if torch.is_grad_enabled():
        return KernelChoice(packed, None, "gradients are enabled; compile and run under torch.no_grad()")
    return _compiled(spec)


def _compiled(spec: ExpertsSpec | DenseExpertsSpec) -> KernelChoice:
    packed = isinstance(spec, ExpertsSpec)
    try:
        kernel = experts_kernel(spec)
    except KernelError as error:
        return KernelChoice(packed, None, f"{type(error).__name__}: {error}")
    kind = "packed" if packed else "dense"
    return KernelChoice(packed, f"kernel of {kind} experts, {spec}, {kernel.isa.name}")
