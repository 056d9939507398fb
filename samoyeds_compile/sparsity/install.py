"""Put pruned weights into a model, packed, and take them out again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samoyeds_compile.sparsity.pack import PackedWeight
from samoyeds_compile.sparsity.projections import Projection
from samoyeds_compile.sparsity.tensor import Form, PackedTensor


@dataclass(frozen=True)
class Replacement:
    """A parameter that is to take the place of another."""

    owner: nn.Module
    attribute: str
    parameter: nn.Parameter


def packed(projection: Projection, pieces: list[PackedWeight]) -> tuple[Replacement, int]:
    """What is to hold pruned weights, and its bytes.

    Args:
        projection: whose weights.
        pieces: the packed matrix of each expert, gate rows before up rows; the list is emptied, to have only one copy
            of most of what is packed at a time.
    """
    first = pieces[0]
    form = Form(first.config, *first.shape, projection.transposed, projection.interleaved, flat=bool(projection.flat))
    values = [piece.values for piece in pieces]
    metadata, selection = [piece.metadata for piece in pieces], [piece.selection for piece in pieces]
    del first
    pieces.clear()
    kept = _joined(values, projection.stacked)
    assert kept is not None
    weight = PackedTensor(kept, _joined(metadata, projection.stacked), _joined(selection, projection.stacked), form)
    parameter = nn.Parameter(weight, requires_grad=False)
    return Replacement(projection.owner, projection.attribute, parameter), weight.packed_nbytes


def _joined(parts: list[Tensor] | list[Tensor | None], stacked: bool) -> Tensor | None:
    """One tensor of those of all experts, which are released; None if there are none."""
    tensors = [part for part in parts if part is not None]
    parts.clear()
    if not tensors:
        return None
    return torch.stack(tensors) if stacked else tensors[0]


def install(replacements: list[Replacement]) -> None:
    """Replace parameters, all of them."""
    for replacement in replacements:
        setattr(replacement.owner, replacement.attribute, replacement.parameter)


def densify_(model: nn.Module) -> int:
    """Replace the packed weights of a model by dense ones with the same values, in place.

    The pruned values stay zero. The dense parameters need gradients.

    Returns:
        How many parameters were packed.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if isinstance(parameter, PackedTensor)
    ]
    dense: dict[int, nn.Parameter] = {}
    for module, name, parameter in places:
        if id(parameter) not in dense:
            dense[id(parameter)] = nn.Parameter(parameter.to_dense().contiguous())
        setattr(module, name, dense[id(parameter)])
    return len(dense)
