"""Distillation: the pruned model also learns the distribution of a dense teacher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from samoyeds_compile.errors import SparsityError

IGNORED = -100
"""Label of positions that count for no loss, as in transformers."""
NOT_FOR_TEACHER = ("labels", "num_items_in_batch")


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 2.0, counted: Tensor | None = None, items: Any = None
) -> Tensor:
    """KL(softmax(teacher / T), softmax(student / T)) * T^2 (Hinton, Vinyals, Dean, arXiv 1503.02531), in float32.

    Args:
        student: logits [..., classes].
        teacher: logits of the same shape; no gradient flows to them.
        temperature: T.
        counted: boolean [...]: positions that count; all by default.
        items: what to divide the sum over positions by; their number by default, so that the result is a mean.

    Raises:
        SparsityError: the shapes differ.
    """
    if student.shape != teacher.shape:
        shapes = f"{list(teacher.shape)} from the teacher and {list(student.shape)} from the student"
        raise SparsityError(f"distillation: logits are {shapes}; pass a teacher with the same vocabulary")
    wanted = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    got = F.log_softmax(student.float() / temperature, dim=-1)
    each = F.kl_div(got, wanted, reduction="none", log_target=True).sum(dim=-1) * temperature**2
    if counted is None:
        return each.mean() if items is None else each.sum() / items
    total = torch.where(counted, each, 0.0).sum()
    return total / (counted.sum().clamp(min=1) if items is None else items)


class Distillation:
    """Adds `distillation_loss` to the loss that a model in training returns.

    The model and the teacher return an object with ``logits``, the model with ``loss`` too, as in transformers. The
    teacher gets the model's arguments but labels. The result is ``loss + weight * distillation_loss``; where the caller
    passes ``num_items_in_batch`` (transformers' Trainer, for accumulated gradients), positions are divided by that.

    Attributes:
        teacher: the dense model; set to eval, never trained, no part of the student.
        temperature: T.
        weight: factor of the term.
        shift: labels are those of the next position (causal language models), so the last position has none.
    """

    def __init__(
        self, teacher: nn.Module, *, temperature: float = 2.0, weight: float = 1.0, shift: bool = True
    ) -> None:
        if not temperature > 0:
            raise SparsityError(f"Distillation: temperature is {temperature!r}; pass a positive number")
        if not weight > 0:
            raise SparsityError(f"Distillation: weight is {weight!r}; pass a positive number, or leave distill out")
        self.teacher = teacher.eval()
        self.temperature = temperature
        self.weight = weight
        self.shift = shift

    def attach(self, student: nn.Module) -> RemovableHandle:
        """Hook the term into a model; the handle removes it.

        Raises:
            SparsityError: the student is its own teacher.
        """
        mine = {id(p) for p in self.teacher.parameters()}
        if any(id(p) in mine for p in student.parameters()):
            raise SparsityError("Distillation: teacher and student share parameters; pass a copy.deepcopy of the model")

        # A function, not a method: copies of the student then share the teacher and do not copy it.
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if module.training and getattr(output, "loss", None) is not None:
                output.loss = output.loss + self.weight * self.term(args, kwargs, output.logits)
            return output

        return student.register_forward_hook(hook, with_kwargs=True)

    def term(self, args: tuple[Any, ...], kwargs: dict[str, Any], logits: Tensor) -> Tensor:
        """The unweighted term for the arguments of a call and the logits [B, T, classes] or [B, classes] it gave."""
        with torch.no_grad():
            wanted = self.teacher(*args, **{k: v for k, v in kwargs.items() if k not in NOT_FOR_TEACHER}).logits
        labels, items = kwargs.get("labels"), kwargs.get("num_items_in_batch")
        if labels is None:
            return distillation_loss(logits, wanted, self.temperature, items=items)
        if self.shift:
            logits, wanted, labels = logits[:, :-1], wanted[:, :-1], labels[:, 1:]
        return distillation_loss(logits, wanted, self.temperature, labels != IGNORED, items)
