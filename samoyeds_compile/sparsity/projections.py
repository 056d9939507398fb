"""Expert weights of a model, read as matrices whatever their storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samoyeds_compile.sparsity.layout import StorageLayout

Tokens = Callable[..., Iterator[tuple[int, Tensor, Tensor]]]
"""Of the arguments of a call: the number of an expert, its tokens [N, H] and their routing weights [N]."""
Between = Callable[..., Tensor]
"""What the last projection takes, [N, I], of what the others give."""


def path(*names: str) -> str:
    """Dotted name of what stands below a module, which may be the model itself."""
    return ".".join(name for name in names if name)


@dataclass(frozen=True)
class Projection:
    """One parameter with the weights of one expert or of a stack of them.

    Attributes:
        name: dotted name of the parameter in the model.
        owner: the module that holds it.
        attribute: its name there.
        role: ``"up"`` (rows are intermediate features), ``"down"`` (columns are) or ``"other"``.
        stacked: the parameter is of all experts: [E, ...], or flat.
        flat: how many matrices the parameter has one below the other, [E · rows, cols]; 0 if it is not flat.
        transposed: a stored matrix is [cols, rows].
        runs: 2 where gate and up are one matrix, [gate rows; up rows] when read.
        interleaved: rows of gate and up alternate in storage.
        bias: attribute of the bias, if there is one.
    """

    name: str
    owner: nn.Module
    attribute: str
    role: str
    stacked: bool = False
    flat: int = 0
    transposed: bool = False
    runs: int = 1
    interleaved: bool = False
    bias: str | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter as it is now."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found

    @property
    def stored(self) -> Tensor:
        """The parameter as [E, ., .], or as a matrix if it is one."""
        weight = self.parameter.detach()
        return weight.view(self.flat, -1, weight.shape[-1]) if self.flat else weight

    @property
    def experts(self) -> int:
        """How many experts the parameter has weights of."""
        return self.stored.shape[0] if self.stacked else 1

    @property
    def layout(self) -> StorageLayout:
        """Where rows and columns lie in storage."""
        return StorageLayout(self.transposed, self.interleaved, self.flat)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols): output features, input features."""
        sizes = [int(size) for size in self.stored.shape[-2:]]
        return (sizes[1], sizes[0]) if self.transposed else (sizes[0], sizes[1])

    def stored_matrix(self, expert: int) -> Tensor:
        """Matrix [rows, cols] of an expert, a view with the rows as they are stored."""
        matrix = self.stored[expert] if self.stacked else self.stored
        return matrix.mT if self.transposed else matrix

    def row_index(self) -> Tensor | None:
        """[rows]: where each row lies in `stored_matrix`, gate rows before up rows; None if they are in place."""
        if not self.interleaved:
            return None
        places = torch.arange(self.shape[0], device=self.parameter.device)
        return places.view(-1, self.runs).T.reshape(-1)


@dataclass(frozen=True)
class Stack:
    """How a module runs the experts that it holds stacks of.

    Attributes:
        tokens: what each expert gets, of the arguments of a call of the module.
        between: what stands between the projections.
    """

    tokens: Tokens
    between: Between


@dataclass(frozen=True)
class Block:
    """Experts that one set of statistics describes: a stack of them, or one expert of a list.

    Attributes:
        name: dotted name of the module.
        module: the module.
        layer: name of what holds all experts of the layer; the module's own, or its list's.
        projections: all of its projections, in the order in which they run.
        chosen: names of those to work on.
        stack: how the module runs them, if it holds stacks.
    """

    name: str
    module: nn.Module
    layer: str
    projections: tuple[Projection, ...]
    chosen: frozenset[str]
    stack: Stack | None = None

    @property
    def experts(self) -> int:
        """How many experts; a stack may have more matrices, which no token reaches."""
        return min(projection.experts for projection in self.projections)

    def of_role(self, role: str) -> list[Projection]:
        """Projections of a role."""
        return [projection for projection in self.projections if projection.role == role]
