"""Whether a block runs as one kernel, which, and if not, why."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.kernel import ExpertsKernel, experts_kernel
from samoyeds_codegen.cpp.layouts import Layouts
from samoyeds_codegen.cpp.product import ProductKernel, product_kernels
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.lower.gpu import GpuKernels, gpu_kernels, switched_off
from samoyeds_compile.ops.experts_dense import dense_spec
from samoyeds_compile.ops.experts_packed import kernel_spec
from samoyeds_compile.ops.operands import num_experts
from samoyeds_compile.sparsity.tensor import PackedTensor

if TYPE_CHECKING:
    from samoyeds_compile.layout.plan import LayoutPlan


@dataclass(frozen=True)
class KernelChoice:
    """How a block is computed.

    Attributes:
        packed: whether its weights are packed.
        kernel: what the report calls the kernel; None if there is none.
        reason: why there is none.
        texts: gives what was generated, by names of files; only a dump asks.
        kinds: of kernels for CUDA devices, as `gpu_experts` takes them; empty for a kernel of the CPU.
        block: index of the block in the graph's report; None where nothing is reported.
        layouts: of the edges inside a kernel for CPUs, by name.
        gathers: layouts of kernels for CUDA devices, as `gpu_experts` takes them.
        products: whether the products of stages are generated, where no kernel computes the whole block.
    """

    packed: bool
    kernel: str | None
    reason: str = ""
    texts: Callable[[], Mapping[str, str]] = dict
    kinds: str = ""
    block: int | None = None
    layouts: str = ""
    gathers: int = 0
    products: bool = False

    @property
    def arguments(self) -> list[str | int]:
        """What `op` takes beside the operands of the canonical op."""
        more: list[str | int] = [self.kinds, self.gathers] if self.kinds else [self.layouts]
        while more and not more[-1]:
            more.pop()  # defaults
        return more

    @property
    def op(self) -> torch._ops.OpOverload | None:
        """What computes the block with the kernel, in place of the canonical op; None without a kernel."""
        ops = torch.ops.samoyeds
        if self.kernel is None:
            return None
        if self.kinds:
            return ops.experts_gpu.default
        return ops.experts_packed.default if self.packed else ops.experts_dense.default

    def __str__(self) -> str:
        """For the report."""
        if self.packed:
            instead = "weights are unpacked in every call"
        else:
            instead = "products are generated, one by one" if self.products else "products are PyTorch's"
        return self.kernel or f"without a kernel, {instead}: {self.reason}"


def choose_kernel(
    expert_ids_TK: torch.Tensor,
    gate: Sequence[torch.Tensor],
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    *options: Any,
    bias: bool = False,
    triton: bool | None = None,
    measure: bool = False,
    layouts: LayoutPlan | None = None,
) -> KernelChoice:
    """Compile the kernel of a block, unless the cache has it, and say how the block is computed.

    Args:
        expert_ids_TK: of which only the shape counts; T may be symbolic.
        gate, up, down: its weights, or fakes of them.
        options: what else `kernel_spec`, `dense_spec` and `gpu_spec` take.
        bias: whether any projection has a bias.
        triton: the option of this name.
        measure: whether candidates for CUDA devices are measured.
        layouts: the plan; None takes that of the specification, and on a CUDA device loads that gather.
    """
    packed = any(isinstance(weight, PackedTensor) for weight in (*gate, *up, *down))
    if up[0].device.type == "cuda":
        if (off := switched_off(packed, triton)) is not None:
            return KernelChoice(packed, None, off)
        found = gpu_kernels(
            expert_ids_TK, gate, up, down, *options, bias=bias, measure=measure,
            gathers=layouts.gathers if layouts else 0,
        )  # fmt: skip
        return gpu_choice(packed, found)
    spec = cpu_spec(gate, up, down, *options)
    if isinstance(spec, str):
        return _by_products([*gate, *up, *down], options[-1], spec)
    if torch.is_grad_enabled():
        return _by_products(
            [*gate, *up, *down], options[-1], "gradients are enabled; compile and run under torch.no_grad()"
        )
    if layouts is None or layouts.layouts is None:
        return _compiled(spec)
    if not _may_fit(layouts.layouts, expert_ids_TK, num_experts(up)):
        why = "weights are stored [in, out], of which only few tokens make a fast kernel"
        return _by_products([*gate, *up, *down], options[-1], why)
    return _compiled(replace(spec, layouts=layouts.layouts))


def _by_products(weights: Sequence[torch.Tensor], dtype: torch.dtype, reason: str) -> KernelChoice:
    """No kernel of the whole block; those of its products are compiled now, not in the first call."""
    packed = any(isinstance(weight, PackedTensor) for weight in weights)
    fit = not packed and all(weight.device.type == "cpu" and weight.dtype == dtype for weight in weights)
    kernels = product_kernels(str(dtype).removeprefix("torch.")) if fit else []
    return KernelChoice(packed, None, reason, texts=partial(_product_texts, kernels), products=bool(kernels))


def gpu_choice(packed: bool, found: GpuKernels) -> KernelChoice:
    """Kernels for a CUDA device as the choice for a block."""
    if not found.kinds:
        return KernelChoice(packed, None, found.text)
    return KernelChoice(packed, found.text, texts=found.texts, kinds=found.kinds, gathers=found.gathers)


def cpu_spec(
    gate: Sequence[torch.Tensor], up: Sequence[torch.Tensor], down: Sequence[torch.Tensor], *options: Any
) -> ExpertsSpec | DenseExpertsSpec | str:
    """The kernel for a CPU that computes a block with these weights, or fakes of them, or why there is none."""
    packed = any(isinstance(weight, PackedTensor) for weight in (*gate, *up, *down))
    return (kernel_spec if packed else dense_spec)(gate, up, down, *options)


def _may_fit(layouts: Layouts, expert_ids_TK: torch.Tensor, experts: int) -> bool:
    """Whether the kernel is for so many tokens; if their number is a symbol, for any at all, as calls then decide."""
    tokens, top_k = expert_ids_TK.shape
    return layouts.fits(tokens * top_k, experts) if isinstance(tokens, int) else layouts.most != 0


def _compiled(spec: ExpertsSpec | DenseExpertsSpec) -> KernelChoice:
    packed = isinstance(spec, ExpertsSpec)
    try:
        kernel = experts_kernel(spec)
    except KernelError as error:
        return KernelChoice(packed, None, f"{type(error).__name__}: {error}")
    kind, isa = "packed" if packed else "dense", kernel.isa
    name = f"{kind}_{spec.dtype}_{isa.name}_{hashlib.sha256(spec.name.encode()).hexdigest()[:8]}"
    title = f"kernel of {kind} experts, {spec}, {isa.name}"
    return KernelChoice(packed, title, texts=partial(_texts, kernel, name), layouts=spec.layouts.name)


def _texts(kernel: ExpertsKernel | ProductKernel, name: str) -> dict[str, str]:
    """What was generated and how it was compiled, by names of files."""
    texts = {f"{name}.cpp": emit(kernel.spec, kernel.isa), f"{name}.log": kernel.log}
    return {file: text for file, text in texts.items() if text}


def _product_texts(kernels: Sequence[ProductKernel]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for kernel in kernels:
        order = "_by_columns" if kernel.spec.by_columns and kernel.spec.product == "linear" else ""
        texts |= _texts(kernel, f"{kernel.spec.product}{order}_{kernel.spec.dtype}_{kernel.isa.name}")
    return texts
