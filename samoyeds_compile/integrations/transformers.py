"""Make the experts of a transformers model capturable: `enable`, and back: `disable`.

    with samoyeds_compile.integrations.transformers.enable(model):
        compiled = torch.compile(model, backend="samoyeds")

Two kinds of models need it; on all others it does nothing.

**Experts with ``@use_experts_implementation`` that run "eager"** are switched to ``grouped_mm``, an implementation of
the library's own. It is exact for every decorated family, works without our backend as well, and the backend rewrites
it like that of any other model. An implementation of ours, registered with the library's ``ExpertsInterface``, would
have to repeat what each family does between the projections (``_apply_gate``, norms, expert parallelism), all of which
the matcher reads off the graph. What is set is ``config._experts_implementation_internal`` of those configs which the
experts themselves hold, as ``model.set_experts_implementation`` does; that method asks for the library's model class,
switches sub-models that were not eager too, and does not restore sub-configs one by one.

**Experts without the decorator that loop over those that were hit** (`families.FAMILIES`: dbrx, jetmoe, longcat_flash,
nllb_moe, step3p7, switch_transformers) get a forward of their own, on the instance. It runs the class's forward, except
while a compiler traces: then it runs an equivalent that calls ``samoyeds::moe_experts``. So results outside compiled
code are the same to the last bit. Classes, parameters, ``state_dict``, ``pickle`` and ``copy.deepcopy`` are unaffected;
a copy of an enabled model is enabled. Before it is put in place the equivalent runs once against the original, on six
random tokens; a module for which the results differ is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from samoyeds_compile.errors import IntegrationError
from samoyeds_compile.integrations.families import family_of
from samoyeds_compile.integrations.family import Family, Unsupported
from samoyeds_compile.integrations.trial import disagreement

EAGER, CAPTURABLE = "eager", "grouped_mm"
_PREVIOUS = "_samoyeds_previous_implementation"
"""Attribute of a decorated module that was switched: the implementation to go back to."""


@dataclass(frozen=True)
class Enabled:
    """What `enable` did; leaving it as a context undoes that much.

    Attributes:
        model: the model.
        changed: dotted paths of the modules that now run in a capturable form.
        left: path and reason for each module that is known but could not be changed.
    """

    model: nn.Module = field(repr=False)
    changed: tuple[str, ...]
    left: dict[str, str]

    def disable(self) -> None:
        """Undo what this call of `enable` changed."""
        _restore(self.model, set(self.changed))

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *exception: object) -> None:
        self.disable()

    def __str__(self) -> str:
        if not self.changed and not self.left:
            return "nothing to do: no experts that run as a Python loop, or they are enabled already"
        lines = [f"{len(self.changed)} module(s) made capturable"]
        return "\n".join(lines + [f"left as it is: {path}: {reason}" for path, reason in self.left.items()])


def enable(model: nn.Module) -> Enabled:
    """Make experts that run as a Python loop capturable, so that the model compiles to one graph.

    Call it before or after ``torch.compile``: compiled code notices the change and is compiled anew. A model without
    such experts is left as it is; so is one that is enabled already.

    Args:
        model: a transformers model, or any module that contains one; a compiled module is unwrapped.

    Returns:
        What was changed, and what was left alone and why. ``print`` it; use it as a context to undo it at the end.

    Raises:
        IntegrationError: ``model`` is no module.
    """
    model = _unwrapped(model)
    changed, left = _switch_decorated(model)
    for path, module, family in _replaceable(model, left):
        activation = family.activation(module)
        module.forward = functools.partial(_forward, family.forward, module, activation)
        changed.append(path)
    return Enabled(model, tuple(changed), left)


def disable(model: nn.Module) -> tuple[str, ...]:
    """Undo every `enable` of a model.

    Returns:
        Dotted paths of the modules that run as their class says again.

    Raises:
        IntegrationError: ``model`` is no module.
    """
    return _restore(_unwrapped(model), None)


def runs_eager_experts(module: nn.Module) -> bool:
    """Whether a module is a set of decorated experts that runs its eager loop and could run otherwise.

    Source: ``transformers/integrations/moe.py: use_experts_implementation``, which sets the attributes looked for.
    """
    decorated = hasattr(module, "_is_expert_parallel") and hasattr(module, "is_concatenated")
    return decorated and getattr(getattr(module, "config", None), "_experts_implementation", None) == EAGER


def is_enabled(module: nn.Module) -> bool:
    """Whether a module runs a forward that `enable` gave it."""
    forward = vars(module).get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward


def _forward(replacement: Callable[..., Any], module: nn.Module, activation: str, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return replacement(module, activation, *args, **kwargs)
    return type(module).forward(module, *args, **kwargs)


def _unwrapped(model: Any) -> nn.Module:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise IntegrationError(f"enable/disable: model is a {kind}, not a module; pass the model itself")
    return model


def _switch_decorated(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Switch decorated experts from their loop to grouped products."""
    eager = [(path, module) for path, module in model.named_modules() if runs_eager_experts(module)]
    left = {path: reason for path, module in eager if (reason := _quantised(module))}
    if not left:  # experts share their config
        for _, module in eager:
            setattr(module, _PREVIOUS, EAGER)
            cast(Any, module.config)._experts_implementation_internal = CAPTURABLE
    return [] if left else [path for path, _ in eager], left


def _replaceable(model: nn.Module, left: dict[str, str]) -> list[tuple[str, nn.Module, Family]]:
    """Modules to give another forward; adds to ``left`` those that cannot have one, and why.

    A helper that cannot change keeps the other modules of its file as they are, since they pass it what it must take.
    """
    found = [entry for entry in _known(model) if not is_enabled(entry[1])]
    reasons = {path: _obstacle(module, family) for path, module, family in found}
    blocked = {family.module for path, _, family in found if reasons[path] and not family.is_experts}
    for path, _, family in found:
        if family.module in blocked and not reasons[path]:
            reasons[path] = "a module that it works with is left as it is"
    left.update({path: reason for path, reason in reasons.items() if reason})
    return [entry for entry in found if not reasons[entry[0]]]


def _known(model: nn.Module) -> Iterator[tuple[str, nn.Module, Family]]:
    for path, module in model.named_modules():
        family = family_of(module)
        if family is not None:
            yield path, module, family


def _obstacle(module: nn.Module, family: Family) -> str | None:
    """Why a module cannot have another forward, or None."""
    if "forward" in vars(module):
        return "its forward is replaced already (by the hooks of another library, say)"
    if any(parameter.is_meta for parameter in module.parameters()):
        return "its weights are on the meta device; enable the model after loading them"
    if reason := _quantised(module):
        return reason
    training = {part: part.training for part in module.modules()}
    try:
        module.eval()  # what is drawn at random cannot be compared
        activation = family.activation(module)
        args = family.sample(module, torch.Generator().manual_seed(0))
        device = next(module.parameters()).device
        return disagreement(type(module).forward, _bound(family, activation), (module, *args), device)
    except Unsupported as reason:
        return str(reason)
    finally:
        for part, flag in training.items():
            part.training = flag


def _bound(family: Family, activation: str) -> Callable[..., Any]:
    return lambda module, *args: family.forward(module, activation, *args)


def _quantised(module: nn.Module) -> str | None:
    odd = {str(p.dtype) for p in module.parameters() if not p.is_floating_point() or p.element_size() < 2}
    return f"its weights are quantised ({', '.join(sorted(odd))})" if odd else None


def _restore(model: nn.Module, paths: set[str] | None) -> tuple[str, ...]:
    """Undo what was changed in the modules at ``paths``, or in all."""
    restored = []
    for path, module in model.named_modules():
        if (paths is None or path in paths) and _restore_one(module):
            restored.append(path)
    return tuple(restored)


def _restore_one(module: nn.Module) -> bool:
    if is_enabled(module):
        del module.forward
        return True
    previous = vars(module).pop(_PREVIOUS, None)
    config: Any = getattr(module, "config", None)
    if previous is not None and config._experts_implementation == CAPTURABLE:
        config._experts_implementation_internal = previous
    return previous is not None
