"""What `sparse_experts` and `dense_experts` share, ops that compute a whole block in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from samoyeds_codegen.cpp.layouts import Layouts
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_compile.ops.library import bad_operand, define_opaque


def refusal(weights: Sequence[Tensor], weighting: str, compute_dtype: torch.dtype) -> str | None:
    """Why no kernel computes experts with these weights, whatever their storage; None if nothing is against it."""
    if any(w.device.type != "cpu" for w in weights):
        return "weights are not on the CPU"
    if any(w.dtype != compute_dtype for w in weights):
        return f"weights are not {compute_dtype}, in which the block computes"
    if weighting != "output":
        return "routing weights multiply what goes into the experts"
    return None


Spec = TypeVar("Spec", ExpertsSpec, DenseExpertsSpec)


def with_layouts(spec: Spec, layouts: str) -> Spec:
    """The specification with layouts by name, if they are given."""
    return replace(spec, layouts=Layouts.named(layouts)) if layouts else spec


def needs_gradients(operands: Iterable[Tensor | None]) -> bool:
    """Whether autograd must see the block, which a kernel hides from it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def check_tokens(op: str, x_TH: Tensor, expert_ids_TK: Tensor, expert_weights_TK: Tensor) -> None:
    """Raise `OperandError` unless the tokens and their routing are such that a kernel reads nothing beyond them."""
    if x_TH.device.type != "cpu" or x_TH.dim() != 2:
        raise bad_operand(op, "x", f"lies on {x_TH.device}, rank {x_TH.dim()}", "pass [T, H] on the CPU")
    if expert_ids_TK.shape != expert_weights_TK.shape or expert_ids_TK.shape[:-1] != x_TH.shape[:-1]:
        shapes = f"{list(expert_ids_TK.shape)} and {list(expert_weights_TK.shape)}"
        raise bad_operand(op, "expert_ids and expert_weights", f"have shapes {shapes}", "pass [T, K] both")


def define_kernel_op(name: str, attributes: str, kernel: Callable[..., Tensor]) -> None:
    """Register an op and ``<name>_loading``, which C++ calls where it has no kernel.

    Args:
        name: of the op.
        attributes: its arguments after the tensors; the last one is ``out_dtype``.
        kernel: what both run until C++ is loaded.
    """
    operands = (
        "Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor[] gate, Tensor[] up, Tensor[] down, "
        "Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias"
    )
    for each in (name, f"{name}_loading"):
        define_opaque(f"{each}({operands}, {attributes}) -> Tensor", kernel, _fake)


def _fake(x_TH: Tensor, *rest: object) -> Tensor:
    out_dtype = rest[-1]
    assert isinstance(out_dtype, torch.dtype)
    return x_TH.new_empty(x_TH.shape, dtype=out_dtype)
