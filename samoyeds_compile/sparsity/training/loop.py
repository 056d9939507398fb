"""Training of a model with masks: what happens beside the optimizer's steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.training.distill import Distillation
from samoyeds_compile.sparsity.training.masked import MaskedParameter, masked_parameters, set_class
from samoyeds_compile.sparsity.training.prepare import bake_

METHODS = ("fixed", "sr_ste")


class SparseTraining:
    """Fixed masks, or masks that follow the weights (SR-STE), for a plain training loop.

    ::

        make_trainable_(model, names, config)
        training = SparseTraining(config, method="sr_ste")
        training.attach(model)
        for batch in batches:
            model(**batch).loss.backward()
            training.before_step()
            optimizer.step()
            training.step()
            optimizer.zero_grad()
        training.finish()

    ``fixed``: pruned values get no gradient. ``sr_ste`` (Zhou et al., arXiv 2102.04010): the gradient of the
    pruned weight goes to the dense master unchanged, ``decay * (1 - mask) * master`` is added to it before a step, and
    every ``refresh_every`` steps the mask is taken anew from the master's magnitudes. Nothing is random. With
    accumulated gradients `before_step` and `step` belong to optimizer steps, not to micro-batches.

    Args:
        config: the pattern that the model was prepared with.
        method: ``"fixed"`` or ``"sr_ste"``.
        decay: of pruned values, with ``sr_ste``; 2e-4 is the paper's.
        refresh_every: steps from mask to mask, with ``sr_ste``; 1, the paper's, by default.
        stop_refresh_at: no new masks after this many steps, so that the weights settle on the last ones.
        distill: a teacher to learn from besides.

    Raises:
        SparsityError: an argument does not exist for the method or is out of range.
    """

    def __init__(
        self,
        config: SparsityConfig,
        *,
        method: str = "fixed",
        decay: float = 2e-4,
        refresh_every: int | None = None,
        stop_refresh_at: int | None = None,
        distill: Distillation | None = None,
    ) -> None:
        if method not in METHODS:
            raise SparsityError(f"SparseTraining: method is {method!r}; pass 'fixed' or 'sr_ste'")
        if method == "fixed" and (refresh_every is not None or stop_refresh_at is not None):
            raise SparsityError("SparseTraining: fixed masks are not refreshed; pass method='sr_ste' or no refresh")
        if refresh_every is not None and refresh_every < 1:
            raise SparsityError(f"SparseTraining: refresh_every is {refresh_every}; pass 1 or more steps")
        if not decay >= 0:
            raise SparsityError(f"SparseTraining: decay is {decay!r}; pass 0 or more")
        self.config = config
        self.method = method
        self.decay = decay
        self.refresh_every = refresh_every or 1
        self.stop_refresh_at = stop_refresh_at
        self.distill = distill
        self.steps = 0
        """Optimizer steps done; set it, or load `state_dict`, to resume."""
        self.model: nn.Module | None = None
        self._decayed = False
        self._hook: RemovableHandle | None = None

    def attach(self, model: nn.Module) -> None:
        """Begin with a prepared model.

        Raises:
            SparsityError: nothing in the model is masked, its pattern is another, or this training has a model already.
        """
        if self.model is not None:
            raise SparsityError("SparseTraining: has a model already; finish it, or make a new SparseTraining")
        masked = masked_parameters(model)
        if not masked:
            raise SparsityError(
                f"SparseTraining: no parameter of {type(model).__name__} has a mask; call make_trainable_"
            )
        for parameter in masked:
            if parameter.config != self.config:
                patterns = f"{parameter.config}, this training is for {self.config}"
                raise SparsityError(
                    f"SparseTraining: {parameter.name} has the pattern {patterns}; pass one config to both"
                )
        for module in {id(p.module): p.module for p in masked}.values():
            set_class(module, straight_through=self.method == "sr_ste")
        if self.distill is not None:
            self._hook = self.distill.attach(model)
        self.model = model

    def before_step(self) -> None:
        """Between backward (after unscaling and clipping, if any) and the optimizer's step.

        Raises:
            SparsityError: no model is attached.
        """
        for parameter in self._masked():
            self._change_gradient(parameter)
        self._decayed = True

    def step(self) -> None:
        """After the optimizer's step: count it, and take new masks where they are due.

        Raises:
            SparsityError: `before_step` was left out, a master is not finite, or no model is attached.
        """
        masked = self._masked()
        if self.method == "sr_ste" and not self._decayed:
            raise SparsityError("SparseTraining: SR-STE changes gradients; call before_step() before optimizer.step()")
        self._decayed = False
        self.steps += 1
        if self._refresh_is_due():
            for parameter in masked:
                parameter.refresh()

    def finish(self) -> nn.Module:
        """Write the pruned weights into the parameters and end; the model is a plain one again, with the pattern.

        Raises:
            SparsityError: a mask does not have the pattern, or no model is attached.
        """
        self._masked()
        assert self.model is not None
        model = bake_(self.model)
        if self._hook is not None:
            self._hook.remove()
        self.model = self._hook = None
        return model

    def state_dict(self) -> dict[str, Any]:
        """What the model and the optimizer do not hold: the count of steps, and for which training it is."""
        return {"config": str(self.config), "method": self.method, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume.

        Raises:
            SparsityError: the state is of another pattern or method.
        """
        for key, mine in (("config", str(self.config)), ("method", self.method)):
            if state.get(key) != mine:
                raise SparsityError(f"SparseTraining: the saved {key} is {state.get(key)!r}, this one is {mine!r}")
        self.steps = int(state["steps"])

    def _masked(self) -> list[MaskedParameter]:
        if self.model is None:
            raise SparsityError("SparseTraining: no model; call attach(model) first")
        return masked_parameters(self.model)

    @torch.no_grad()
    def _change_gradient(self, parameter: MaskedParameter) -> None:
        """Autograd masks fixed gradients, but a penalty of the user's on the masters would reach pruned values too."""
        master, mask = parameter.master, parameter.mask
        if master.grad is None:
            return
        if self.method == "fixed":
            master.grad.masked_fill_(~mask, 0)
        else:
            master.grad.add_(torch.where(mask, 0, master), alpha=self.decay)

    def _refresh_is_due(self) -> bool:
        stopped = self.stop_refresh_at is not None and self.steps > self.stop_refresh_at
        return self.method == "sr_ste" and not stopped and self.steps % self.refresh_every == 0
