"""Whether experts with packed weights run as one kernel, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from samoyeds_codegen.cpp.kernel import experts_kernel
from samoyeds_codegen.cpp.spec import ExpertsSpec
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.ops.experts_packed import kernel_spec
from samoyeds_compile.sparsity.tensor import PackedTensor


@dataclass(frozen=True)
class PackedChoice:
    """How a block with packed weights is computed.

    Attributes:
        kernel: what the report calls the kernel; None if products unpack the weights.
        reason: why there is none.
    """

    kernel: str | None
    reason: str = ""

    def __str__(self) -> str:
        """For the report."""
        return self.kernel or f"without a kernel, weights are unpacked in every call: {self.reason}"


def choose_packed(
    gate: Sequence[torch.Tensor], up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], *options: Any
) -> PackedChoice | None:
    """Compile the kernel of a block, unless the cache has it, and say how the block is computed.

    Args:
        gate, up, down: its weights, or fakes of them.
        options: what else `kernel_spec` takes.

    Returns:
        None if no weight is packed.
    """
    if not any(isinstance(weight, PackedTensor) for weight in (*gate, *up, *down)):
        return None
    spec = kernel_spec(gate, up, down, *options)
    if isinstance(spec, str):
        return PackedChoice(None, spec)
    if torch.is_grad_enabled():
        return PackedChoice(None, "gradients are enabled; compile and run under torch.no_grad()")
    return _compiled(spec)


def _compiled(spec: ExpertsSpec) -> PackedChoice:
    try:
        kernel = experts_kernel(spec)
    except KernelError as error:
        return PackedChoice(None, f"{type(error).__name__}: {error}")
    return PackedChoice(f"kernel of packed experts, {spec}, {kernel.isa.name}")
