"""Whether weights can be pruned, found out before anything changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.projections import Block, Projection
from samoyeds_compile.sparsity.training.masked import mask_name


def require_prunable(model: nn.Module, blocks: list[Block], trainable: bool = False) -> None:
    """Check the chosen weights before anything changes: what passes can only fail for want of memory, or in numbers.

    Raises:
        SparsityError: a weight is packed already, masked for training, no plain floating tensor, empty, on the meta
            device, shared with another module, or has values that are infinite or NaN; or there is no room for a mask.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for block in blocks:
        for projection in block.projections:
            if projection.name in block.chosen:
                _require_prunable(projection, names)
                if trainable and hasattr(projection.owner, mask := mask_name(projection.attribute)):
                    raise SparsityError(f"{projection.name}: its module has a {mask} of its own; rename that attribute")


def _require_prunable(projection: Projection, names: dict[int, list[str]]) -> None:
    name, weight = projection.name, projection.parameter
    dims = 3 if projection.stacked and not projection.flat else 2
    if projection.owner._parameters.get(projection.attribute) is not weight:
        raise SparsityError(f"{name}: is computed from other parameters; end training with masks first (bake_)")
    if type(weight) not in (nn.Parameter, Tensor):
        raise SparsityError(f"{name}: is a {type(weight).__name__}; pass dense weights (densify_ undoes packing)")
    if type(weight.data) is not Tensor:
        raise SparsityError(
            f"{name}: holds a {type(weight.data).__name__}; pass dense weights (densify_ undoes packing)"
        )
    if not weight.dtype.is_floating_point or weight.element_size() < 2 or weight.dim() != dims:
        raise SparsityError(f"{name}: is {weight.dtype} {list(weight.shape)}; pass {dims}-D weights of 16 bits or more")
    if not weight.numel():
        raise SparsityError(f"{name}: is empty, {list(weight.shape)}; leave it out with filter_fn")
    if weight.is_meta:
        raise SparsityError(f"{name}: is on the meta device; load the weights first")
    others = [other for other in names.get(id(weight), []) if other != name]
    if others:
        raise SparsityError(f"{name}: is the same parameter as {others[0]}; untie them first")
    if not all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight.detach())):  # isfinite takes 2.5 of these
        raise SparsityError(f"{name}: has values that are infinite or NaN; repair the weights first")
