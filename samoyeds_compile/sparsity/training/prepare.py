"""Masks on chosen parameters of a model, and their end: the pruned weights baked in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.layout import StorageLayout
from samoyeds_compile.sparsity.pack import validate
from samoyeds_compile.sparsity.solver import require_matrix
from samoyeds_compile.sparsity.training.masked import (
    ENTRIES,
    magnitude_mask,
    mask_name,
    masked_parameters,
    plain_class,
    set_class,
)


def make_trainable_(
    model: nn.Module,
    parameters: Mapping[str, Tensor] | Iterable[str],
    config: SparsityConfig,
    *,
    layouts: Mapping[str, StorageLayout] | None = None,
    straight_through: bool = False,
) -> nn.Module:
    """Keep dense masters with masks: the forward reads pruned weights, the optimizer sees the dense parameters.

    Names in ``state_dict`` stay as they are; each mask is one more entry, ``<name>_mask``, boolean. A checkpoint is
    loaded by a model prepared with the same names. Each time that ``forward`` reads a parameter its mask is applied, so
    an eager loop that reads a stack once per expert costs a pruned stack per expert; grouped experts and compiled loops
    read it once.

    Args:
        model: changed in place.
        parameters: full names of parameters [rows, cols] or [E, rows, cols], with boolean masks shaped as stored, or
            names alone: then the masks keep the largest magnitudes.
        config: the pattern.
        layouts: of parameters that are not stored as rows of output features.
        straight_through: pruned values get the gradient of the pruned weight too (SR-STE), instead of none.

    Returns:
        The model.

    Raises:
        SparsityError: a name is no parameter of the model, the parameter is tied, masked already, no matrix or not
            finite, or a mask does not fit it or the pattern. The model is unchanged.
    """
    layouts = dict(layouts or {})
    given = dict(parameters) if isinstance(parameters, Mapping) else dict.fromkeys(parameters)
    if stray := sorted(layouts.keys() - given.keys()):
        raise SparsityError(f"layouts: {stray[0]} is not among the parameters; name it there or leave its layout out")
    uses = Counter(map(id, dict(model.named_parameters(remove_duplicate=False)).values()))
    masks = {}
    for name, mask in given.items():
        module, leaf = _owner(model, name)
        weight = _weight(module, leaf, name, uses)
        layout = layouts.get(name, StorageLayout())
        masks[name] = _mask(weight, mask, config, layout, name)
    touched = {}
    for name, mask in masks.items():
        module, leaf = _owner(model, name)
        module.register_buffer(mask_name(leaf), mask)
        entries = {**getattr(module, ENTRIES, {}), leaf: (config, layouts.get(name, StorageLayout()))}
        setattr(module, ENTRIES, entries)
        touched[id(module)] = module
    for module in touched.values():
        set_class(module, straight_through)
    return model


@torch.no_grad()
def bake_(model: nn.Module) -> nn.Module:
    """Write the pruned weights into the masters and take masks and masked classes away; inverse of `make_trainable_`.

    Returns:
        The model, a plain one whose weights have the pattern.

    Raises:
        SparsityError: a mask is not of its pattern (one was changed by hand, or loaded), or a module's class is not
            the one that it was given. The model is unchanged.
    """
    masked = masked_parameters(model)
    for parameter in masked:
        if hasattr(plain_class(type(parameter.module)), "_masked_leaves"):
            raise SparsityError(
                f"{parameter.name}: the class of its module was changed after make_trainable_, as torch's parametrize "
                "and fully_shard do; take that away before training is finished"
            )
        parameter.validate()
    for parameter in masked:
        parameter.master.copy_(parameter.pruned())
        del parameter.module._buffers[mask_name(parameter.leaf)]
    for module in {id(p.module): p.module for p in masked}.values():
        module.__class__ = plain_class(type(module))
        delattr(module, ENTRIES)
    return model


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        raise SparsityError(f"{name}: the model has no module {path!r}; see model.named_parameters()") from None


def _weight(module: nn.Module, leaf: str, name: str, uses: Counter[int]) -> nn.Parameter:
    """A parameter that can be masked."""
    weight = module._parameters.get(leaf)
    if weight is None:
        raise SparsityError(f"{name}: is no parameter of {type(module).__name__}; see model.named_parameters()")
    require_matrix(weight, name)
    if leaf in getattr(module, ENTRIES, {}):
        raise SparsityError(f"{name}: has a mask already; finish its training before another is set")
    if hasattr(module, mask_name(leaf)):
        raise SparsityError(
            f"{name}: {type(module).__name__} has a {mask_name(leaf)} of its own; rename that attribute"
        )
    if uses[id(weight)] > 1:
        raise SparsityError(f"{name}: is tied to another parameter, which would stay dense; untie it first")
    return weight


def _mask(weight: Tensor, mask: Tensor | None, config: SparsityConfig, layout: StorageLayout, name: str) -> Tensor:
    """A mask of the pattern, on the weight's device: the given one or that of the largest magnitudes."""
    best = magnitude_mask(weight, config, layout, name) if mask is None else mask
    if best.dtype != torch.bool or best.shape != weight.shape:
        what = f"{best.dtype} {tuple(best.shape)}"
        raise SparsityError(
            f"{name}: its mask is {what}; pass a boolean one shaped as the parameter, {tuple(weight.shape)}"
        )
    if mask is not None:
        validate(layout.to_rows(mask, name).to(torch.float32), config, f"the mask of {name}")
    return best.to(weight.device, copy=mask is not None).contiguous()
