"""`SparseTraining` in transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.training.loop import SparseTraining


class SparseTrainingCallback(TrainerCallback):
    """Does what a loop does with `SparseTraining`; pass it in ``Trainer(model, callbacks=[...])``.

    The model is prepared with `make_trainable_` before the Trainer gets it. Checkpoints hold dense masters and masks;
    ``resume_from_checkpoint`` goes on with the step that the Trainer goes on with.

    Args:
        training: not attached yet.
        finish: bake the pruned weights in when training ends; else call ``training.finish()`` later, as after merging
            an adapter.
    """

    def __init__(self, training: SparseTraining, *, finish: bool = True) -> None:
        self.training = training
        self.finish = finish

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the model.

        Raises:
            SparsityError: the model is not prepared; gradients would still be scaled when the decay is added; or the
                loss that the model returns, which holds the teacher's term, would not be used.
        """
        if args.fp16 and not args.max_grad_norm and self.training.method == "sr_ste":
            raise SparsityError(
                "SparseTrainingCallback: with fp16 the Trainer unscales gradients before the step only to clip them, "
                "and SR-STE adds to them before the step; set max_grad_norm, or train in bf16"
            )
        if args.label_smoothing_factor and self.training.distill is not None:
            raise SparsityError(
                "SparseTrainingCallback: with label_smoothing_factor the Trainer computes a loss of its own, without "
                "the teacher's term; set it to 0, or leave distill out"
            )
        model: nn.Module = kwargs["model"]
        if self.training.model is not model:
            self.training.attach(model)
        self.training.steps = state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After clipping, before the optimizer's step."""
        self.training.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer's step."""
        self.training.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bake the pruned weights in, if asked to."""
        if self.finish:
            self.training.finish()
