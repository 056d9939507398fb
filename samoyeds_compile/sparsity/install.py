"""Put pruned weights into a model, packed, and take them out again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from samoyeds_compile.huge_pages import on_huge_pages
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import pack, packed_shapes
from samoyeds_compile.sparsity.projections import Projection
from samoyeds_compile.sparsity.prune import PrunedRows
from samoyeds_compile.sparsity.strips import to_strips_
from samoyeds_compile.sparsity.tensor import Form, PackedTensor


@dataclass(frozen=True)
class Replacement:
    """A parameter that is to take the place of another."""

    owner: nn.Module
    attribute: str
    parameter: nn.Parameter


@dataclass(frozen=True)
class Packing:
    """The packed weights of a parameter while they are made.

    Attributes:
        projection: whose weights.
        weight: all of its experts; allocated before the first is packed, as joining them later takes the bytes twice.
    """

    projection: Projection
    weight: PackedTensor

    @property
    def nbytes(self) -> int:
        """Bytes of storage."""
        return self.weight.packed_nbytes

    def write(self, expert: int, rows: PrunedRows) -> None:
        """Pack some rows of an expert, whole groups of blocks."""
        self.write_rows(expert, rows.part, rows.weight)

    def write_rows(self, expert: int, part: slice, weight: Tensor) -> None:
        """Pack rows that have the pattern, [n, cols]."""
        whole = self.weight.packed
        piece = pack(weight, whole.config, self.projection.name)
        start = part.start * whole.config.n // whole.config.m
        for name, first in (("values", start), ("metadata", start), ("selection", start // whole.config.group)):
            storage, made = getattr(whole, name), getattr(piece, name)
            if made is not None:
                of_expert = storage[expert] if self.projection.stacked else storage
                of_expert[first : first + len(made)] = made

    def replacement(self) -> Replacement:
        """What is to take the place of the dense parameter."""
        weight = self.weight
        if weight.belongs_in_strips:
            to_strips_(weight.packed)
            weight = weight.with_inner(Tensor.detach, replace(weight.form, strips=True))
        parameter = nn.Parameter(weight, requires_grad=False)
        return Replacement(self.projection.owner, self.projection.attribute, parameter)


def packed(projection: Projection, config: SparsityConfig) -> Packing:
    """Room for the packed weights of a parameter."""
    shape, dense = projection.shape, projection.parameter
    lead = (projection.experts,) if projection.stacked else ()
    dtypes = {"values": dense.dtype, "metadata": torch.int16, "selection": torch.uint8}
    values, metadata, selection = (
        None if size is None else on_huge_pages(torch.empty(*lead, *size, dtype=dtypes[part], device=dense.device))
        for part, size in packed_shapes(*shape, config).items()
    )
    assert values is not None
    form = Form(config, *shape, projection.transposed, projection.interleaved, flat=bool(projection.flat))
    return Packing(projection, PackedTensor(values, metadata, selection, form))


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
