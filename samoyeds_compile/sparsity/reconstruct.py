"""Fit what is kept of a layer's experts to what the dense experts gave, without labels: block reconstruction.

As in BRECQ (arXiv 2102.05426) and EBFT (arXiv 2402.12419), with masks fixed: gradient descent on the squared error of
the layer's output, one layer after the other, each on the inputs that the sparse layers before it give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.calibration import evaluating, run
from samoyeds_compile.sparsity.install import Replacement
from samoyeds_compile.sparsity.masters import Masters
from samoyeds_compile.sparsity.projections import Block, path
from samoyeds_compile.sparsity.report import LayerReport

RATE = 0.03
"""Highest step, as a share of the root of the mean square of the kept values of a parameter."""
BETAS = (0.9, 0.95)
WARMUP = 0.05
"""Share of the steps in which the rate goes up; then it goes down as a cosine."""


@dataclass(frozen=True)
class Call:
    """One call of a module: what it got, and its output when its experts were dense."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor

    def error(self, found: Tensor) -> Tensor:
        """Squared error of an output over the squared size of the dense one, float32."""
        wanted = self.output.float()
        return (found.float() - wanted).square().sum() / wanted.square().sum().clamp(
            min=torch.finfo(torch.float32).tiny
        )


def require_steps(steps: int, calibrated: bool) -> None:
    """Check the argument.

    Raises:
        SparsityError: it is no number of steps, or there is no calibration.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise SparsityError(f"reconstruct: is {steps!r}; pass how many steps to fit each layer, 0 for none")
    if steps and not calibrated:
        raise SparsityError("calibration: is None, but reconstruct needs it; pass model inputs, or reconstruct=0")


def holder(block: Block, model: nn.Module) -> tuple[str, nn.Module]:
    """The module of which the output is fitted: that of a stack, or the one that has the list of experts."""
    name = block.name if block.stack is not None else block.layer.rpartition(".")[0]
    return name, model.get_submodule(name)


def record(
    model: nn.Module, modules: Iterable[nn.Module], inputs: list[Any], advance: Callable[[], None]
) -> dict[nn.Module, list[Call]]:
    """Every call of some modules while the model reads the calibration inputs."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        args, kwargs = _kept((args, kwargs))
        calls[module].append(Call(args, kwargs, first_tensor(output).detach().clone()))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in calls]
    try:
        run(model, inputs, advance)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def require_replayable(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Any) -> None:
    """Check on one calibration input that calling a module again gives what it gave.

    Raises:
        SparsityError: it does not, as that of a module that keeps a cache, or draws.
    """
    calls = record(model, modules.values(), [inputs], lambda: None)
    for name, module in modules.items():
        for call in calls[module]:
            with evaluating(module), torch.no_grad():
                again = first_tensor(functional_call(module, {}, call.args, call.kwargs))
            if again.shape != call.output.shape or not torch.allclose(again, call.output, rtol=1e-2, atol=1e-4):
                raise SparsityError(
                    f"reconstruct: {name or type(model).__name__} gives something else when it is called again with "
                    "the same arguments, so it can't be fitted alone; pass reconstruct=0"
                )


def reconstruct(
    name: str,
    module: nn.Module,
    found: list[Masters],
    biases: list[Replacement],
    calls: list[Call],
    steps: int,
    advance: Callable[[], None] = lambda: None,
) -> LayerReport:
    """Fit the kept values of masters, in place; what was better at the start stays as it was.

    The model is not touched: the module is called with other weights. Nothing is random. Room is needed for the
    recorded calls and for six float32 copies of the weights of the layer.

    Args:
        name: of the module in the model.
        module: the one that was recorded.
        found: the masters of weights in it.
        biases: those that take the place of the module's own.
        calls: what was recorded.
        steps: how many, each on one call.
        advance: called after each.
    """
    values = [torch.where(m.mask, m.values, 0).float().requires_grad_() for m in found]
    start = [value.detach().clone() for value in values]
    names = {id(submodule): below for below, submodule in module.named_modules()}
    fixed = {path(names[id(b.owner)], b.attribute): b.parameter for b in biases}

    def output(call: Call) -> Tensor:
        changed = {
            path(names[id(m.projection.owner)], m.projection.attribute): m.stored((value * m.mask).to(m.values.dtype))
            for m, value in zip(found, values, strict=True)
        }
        return first_tensor(functional_call(module, {**fixed, **changed}, call.args, call.kwargs))

    with evaluating(module):
        before = _error(output, calls)
        _descend(values, [m.mask for m in found], output, calls, steps, advance)
        after = _error(output, calls)
    best = values if after < before else start
    for m, value in zip(found, best, strict=True):
        m.values.copy_(torch.where(m.mask, value.detach().to(m.values.dtype), m.values))
    return LayerReport(name, before, min(before, after))


def _descend(
    values: list[Tensor],
    masks: list[Tensor],
    output: Callable[[Call], Tensor],
    calls: list[Call],
    steps: int,
    advance: Callable[[], None],
) -> None:
    """Steps of Adam on the values, in place."""
    groups = [{"params": [v], "lr": RATE * _size(v, mask)} for v, mask in zip(values, masks, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(steps if calls else 0):
        call = calls[step % len(calls)]
        with torch.enable_grad():
            gradients = torch.autograd.grad(call.error(output(call)), values, allow_unused=True)
        for value, gradient in zip(values, gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        schedule.step()
        advance()


def first_tensor(output: Any) -> Tensor:
    """The first tensor of what a module gives; others, as the logits of its router, are not fitted."""
    found = next((o for o in output if isinstance(o, Tensor)), None) if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise SparsityError(f"reconstruct: a {type(output).__name__} is what the layer gives; pass reconstruct=0")
    return found


def _kept(arguments: Any) -> Any:
    """Arguments that stay as they are whatever the model does to its own."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), arguments)


@torch.no_grad()
def _error(output: Callable[[Call], Tensor], calls: list[Call]) -> float:
    return math.sqrt(sum(float(call.error(output(call))) for call in calls) / max(len(calls), 1))


def _size(value: Tensor, mask: Tensor) -> float:
    return float((value.detach().square().sum() / mask.sum().clamp(min=1)).sqrt())


def _rate(step: int, steps: int) -> float:
    """Share of the highest rate."""
    warmup = max(int(WARMUP * steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))
