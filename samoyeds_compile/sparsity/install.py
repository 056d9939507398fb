"""Put pruned weights into a model, packed, and take them out again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.experts import Projection
from samoyeds_compile.sparsity.tensor import PackedTensor


@dataclass(frozen=True)
class Replacement:
    """A parameter that is to take the place of another."""

    owner: nn.Module
    attribute: str
    parameter: nn.Parameter


def packed(projection: Projection, pruned: Tensor, config: SparsityConfig) -> tuple[Replacement, int]:
    """What is to hold a pruned weight, and its bytes.

    Args:
        projection: whose weight.
        pruned: the weight, stored like the parameter.
        config: the pattern that it has.

    Raises:
        SparsityError: it does not have the pattern.
    """
    weight = PackedTensor.from_dense(
        pruned, config, transposed=projection.transposed, interleaved=projection.interleaved, name=projection.name
    )
    parameter = nn.Parameter(weight, requires_grad=False)
    return Replacement(projection.owner, projection.attribute, parameter), weight.packed_nbytes


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
