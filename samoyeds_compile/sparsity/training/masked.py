"""Modules whose forward reads a pruned weight while their parameter stays dense.

A prepared module keeps its parameter under its own name, so optimizers, checkpoints and `save_pretrained` see the dense
master as before; the mask is a buffer beside it. What changes is the class: a subclass in which the parameter's name is
a property that gives the pruned weight. `torch.nn.utils.parametrize` works the same way, but renames the parameter in
``state_dict`` (a transformers checkpoint written in training could then not be loaded by the plain model), and its
modules cannot be pickled.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.layout import StorageLayout
from samoyeds_compile.sparsity.pack import validate
from samoyeds_compile.sparsity.solver import best_mask

ENTRIES = "_masked_parameters"
"""Attribute of a prepared module: for each masked parameter its pattern and its layout."""


@dataclass(frozen=True)
class MaskedParameter:
    """One masked parameter of a model.

    Attributes:
        name: full name in the model.
        module: the module that owns it.
        leaf: its name in that module.
        config: the pattern.
        layout: how rows and columns are stored.
    """

    name: str
    module: nn.Module
    leaf: str
    config: SparsityConfig
    layout: StorageLayout

    @property
    def master(self) -> nn.Parameter:
        """The dense parameter, [rows, cols] or [E, rows, cols] as stored."""
        master = self.module._parameters[self.leaf]
        assert master is not None
        return master

    @property
    def mask(self) -> Tensor:
        """What is kept, boolean, shaped as the master."""
        mask = self.module._buffers[mask_name(self.leaf)]
        assert mask is not None
        return mask

    @torch.no_grad()
    def pruned(self) -> Tensor:
        """The weight that the forward reads, without gradient."""
        return torch.where(self.mask, self.master, 0)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the mask that keeps the most of the master's magnitude, in place: compiled code sees it.

        Raises:
            SparsityError: the master holds NaN or infinity.
        """
        self.mask.copy_(magnitude_mask(self.master, self.config, self.layout, self.name))

    def validate(self) -> None:
        """Raise `SparsityError` unless the pruned weight has the pattern."""
        validate(self.layout.to_rows(self.pruned(), self.name), self.config, self.name)


def mask_name(leaf: str) -> str:
    """The buffer that holds the mask of a parameter."""
    return f"{leaf}_mask"


@torch.no_grad()
def magnitude_mask(weight: Tensor, config: SparsityConfig, layout: StorageLayout, name: str) -> Tensor:
    """The mask, as stored, that keeps the most magnitude of a stored weight.

    Raises:
        SparsityError: the weight holds NaN or infinity, or is no matrix or stack.
    """
    if not bool(weight.isfinite().all()):
        raise SparsityError(f"{name}: holds NaN or infinite values, no mask can rank them; lower the learning rate")
    rows = layout.to_rows(weight.detach().abs(), name)
    if rows.dim() < 3:
        return layout.to_stored(best_mask(rows, config))
    # One expert at a time: the solver works in float64 on several copies of what it is given.
    return layout.to_stored(torch.stack([best_mask(expert, config) for expert in rows]))


def masked_parameters(model: nn.Module) -> list[MaskedParameter]:
    """All masked parameters of a model, in the order of its modules."""
    return [
        MaskedParameter(f"{path}.{leaf}" if path else leaf, module, leaf, config, layout)
        for path, module in model.named_modules()
        for leaf, (config, layout) in getattr(module, ENTRIES, {}).items()
    ]


@contextlib.contextmanager
def dense_masters(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, attributes of prepared modules are the dense parameters themselves, and forward is dense.

    For code that changes ``module.weight`` in place, such as merging an adapter: outside, ``module.weight`` is a new
    tensor each time, and a change to it is lost.
    """
    classes = [(m, type(m)) for m in model.modules() if hasattr(m, ENTRIES)]
    try:
        for module, masked in classes:
            module.__class__ = masked.__bases__[0]
        yield model
    finally:
        for module, masked in classes:
            module.__class__ = masked


def set_class(module: nn.Module, straight_through: bool) -> None:
    """Give a module with entries the class whose properties prune, from its plain class or from another such class."""
    plain: Any = plain_class(type(module))
    module.__class__ = masked_class(plain, tuple(getattr(module, ENTRIES)), straight_through)


def plain_class(of: type[nn.Module]) -> type[nn.Module]:
    """The class of a module before `set_class`."""
    plain = of.__bases__[0] if "_masked_leaves" in vars(of) else of
    assert issubclass(plain, nn.Module)
    return plain


@functools.cache
def masked_class(plain: Any, leaves: tuple[str, ...], straight_through: bool) -> Any:
    """A subclass in which ``leaves`` are pruned.

    One class for all layers of a model, under the plain class's own name: whoever knows modules by their class, as
    Dynamo's guards and the integrations do, sees no more kinds than before.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        made: Any = object.__reduce_ex__(self, 2)
        return (_new, (plain, leaves, straight_through), *made[2:])

    def delete(self: nn.Module, name: str) -> None:
        if name in leaves:
            raise SparsityError(
                f"{plain.__name__}.{name}: has a mask, and can't be taken away or parametrized, as peft does to its "
                "target_parameters; train adapters over packed weights (sparsify_ without trainable=True), or bake_"
            )
        plain.__delattr__(self, name)

    body: dict[str, Any] = {leaf: property(_reader(leaf, straight_through)) for leaf in leaves}
    body |= {"__delattr__": delete, "__reduce_ex__": reduce, "__doc__": plain.__doc__, "__module__": plain.__module__}
    body |= {"__qualname__": plain.__qualname__, "_masked_leaves": leaves}
    return type(plain.__name__, (plain,), body)


def _new(plain: Any, leaves: tuple[str, ...], straight_through: bool) -> Any:
    """An empty module of a masked class, for copies and pickles."""
    masked = masked_class(plain, leaves, straight_through)
    return masked.__new__(masked)


def _reader(leaf: str, straight_through: bool) -> Callable[[nn.Module], Tensor]:
    """What the property of a masked parameter computes.

    ``w - w.detach()`` is exactly 0 and passes the gradient on, so that pruned values get one too. Selected and not
    multiplied: 0 times an infinite value would be NaN, times a negative one -0.
    """
    buffer = mask_name(leaf)

    def masked(module: nn.Module) -> Tensor:
        return torch.where(module._buffers[buffer], module._parameters[leaf], 0)  # type: ignore[arg-type]

    def straight(module: nn.Module) -> Tensor:
        master: Any = module._parameters[leaf]
        return torch.where(module._buffers[buffer], master, master - master.detach())  # type: ignore[arg-type]

    return straight if straight_through else masked
