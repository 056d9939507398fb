"""Recovery training: dense masters with masks, fixed or refreshed (SR-STE), and distillation.

`make_trainable_` puts masks on parameters, `SparseTraining` goes beside the steps of an optimizer and bakes the pruned
weights in at the end, `SparseTrainingCallback` does the same in transformers' Trainer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from samoyeds_compile.sparsity.layout import StorageLayout
from samoyeds_compile.sparsity.training.distill import Distillation, distillation_loss
from samoyeds_compile.sparsity.training.loop import SparseTraining
from samoyeds_compile.sparsity.training.masked import MaskedParameter, dense_masters, masked_parameters
from samoyeds_compile.sparsity.training.prepare import bake_, make_trainable_

if TYPE_CHECKING:
    from samoyeds_compile.sparsity.training.callback import SparseTrainingCallback

__all__ = [
    "Distillation",
    "MaskedParameter",
    "SparseTraining",
    "SparseTrainingCallback",
    "StorageLayout",
    "bake_",
    "dense_masters",
    "distillation_loss",
    "make_trainable_",
    "masked_parameters",
]


def __getattr__(name: str) -> Any:
    """Import the callback on demand: it needs transformers, which is optional."""
    if name != "SparseTrainingCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from samoyeds_compile.sparsity.training.callback import SparseTrainingCallback

    return SparseTrainingCallback
