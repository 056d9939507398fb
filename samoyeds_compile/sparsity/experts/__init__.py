"""Find the expert projections of an eager model: `find_blocks`.

One form of storage a file, and `FORMS` is the list of them. Routers, attention and shared experts are in none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.experts.batched import batched
from samoyeds_compile.sparsity.experts.by_counts import by_counts
from samoyeds_compile.sparsity.experts.decorated import decorated
from samoyeds_compile.sparsity.experts.embedded import embedded
from samoyeds_compile.sparsity.experts.flat import flat
from samoyeds_compile.sparsity.experts.listed import listed
from samoyeds_compile.sparsity.experts.undecorated import undecorated
from samoyeds_compile.sparsity.projections import Block, Projection

Filter = Callable[[str, nn.Module], bool] | Collection[str] | None
"""Which expert parameters: a test of (parameter name, module that holds it), names, or all."""

FORMS: tuple[Callable[[str, nn.Module], list[Block]], ...] = (
    decorated, undecorated, batched, flat, by_counts, listed,
)  # fmt: skip
"""Each gives the blocks of a module, by its name and itself; none if the module is not of its form."""


def find_blocks(model: nn.Module, filter_fn: Filter = None) -> list[Block]:
    """The blocks of experts of a model of which at least one projection is chosen.

    Args:
        model: an eager model.
        filter_fn: which parameters to choose: ``filter_fn(name, module)``, their names, or None for all.

    Raises:
        SparsityError: the model has no experts, nothing is chosen, or a name is not that of an expert's weight.
    """
    found = [block for name, module in model.named_modules() for block in _blocks_of(name, module)]
    names = {projection.name for block in found for projection in block.projections}
    if not names:
        raise SparsityError(_reason(model))
    if filter_fn is not None and not callable(filter_fn):
        for name in sorted(set(filter_fn) - names):
            raise SparsityError(f"{name}: is no expert weight of the model; such are {', '.join(sorted(names)[:4])}")
    chosen = [_chosen(block, filter_fn) for block in found]
    chosen = [block for block in chosen if block.chosen]
    if not chosen:
        raise SparsityError(f"filter_fn: chooses none of the {len(names)} expert weights; {min(names)} is one")
    return chosen


def _blocks_of(name: str, module: nn.Module) -> list[Block]:
    """Of the form that a module has."""
    return next((blocks for form in FORMS if (blocks := form(name, module))), [])


def _reason(model: nn.Module) -> str:
    """Why nothing in a model can be made sparse."""
    vectors = [name for name, module in model.named_modules() if embedded(module)]
    if vectors:
        return (
            f"{vectors[0]}: its experts are single rows of nn.Embedding, looked up by token, so there is no matrix for "
            "each expert to give a pattern to; leave this model dense"
        )
    return (
        f"{type(model).__name__}: has no expert weights that are known; stacks of a transformers experts module, "
        "or nn.Linear in a ModuleList of experts of one structure, can be made sparse"
    )


def _chosen(block: Block, filter_fn: Filter) -> Block:
    def is_chosen(projection: Projection) -> bool:
        if filter_fn is None:
            return True
        return filter_fn(projection.name, projection.owner) if callable(filter_fn) else projection.name in filter_fn

    names = frozenset(projection.name for projection in block.projections if is_chosen(projection))
    return Block(block.name, block.module, block.layer, block.projections, names, block.stack)
