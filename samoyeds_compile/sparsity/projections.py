"""Expert weights of a model, read as matrices whatever their storage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Projection:
    """One parameter with the weights of one expert or of a stack of them.

    Attributes:
        name: dotted name of the parameter in the model.
        owner: the module that holds it.
        attribute: its name there.
        role: ``"up"`` (rows are intermediate features), ``"down"`` (columns are) or ``"other"``.
        stacked: the parameter is [E, ...], not a matrix.
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
    def experts(self) -> int:
        """How many experts the parameter has weights of."""
        return self.parameter.shape[0] if self.stacked else 1

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols): output features, input features."""
        sizes = [int(size) for size in self.parameter.shape[-2:]]
        return (sizes[1], sizes[0]) if self.transposed else (sizes[0], sizes[1])

    def stored(self, expert: int) -> Tensor:
        """Matrix [rows, cols] of an expert, a view with the rows as they are stored."""
        stored = self.parameter.detach()
        matrix = stored[expert] if self.stacked else stored
        return matrix.mT if self.transposed else matrix

    def row_index(self) -> Tensor | None:
        """[rows]: where each row lies in `stored`, gate rows before up rows; None if they are in place."""
        if not self.interleaved:
            return None
        places = torch.arange(self.shape[0], device=self.parameter.device)
        return places.view(-1, self.runs).T.reshape(-1)


@dataclass(frozen=True)
class Block:
    """Experts that one set of statistics describes: a stack of them, or one expert of a list.

    Attributes:
        name: dotted name of the module.
        module: the module.
        layer: name of what holds all experts of the layer; the module's own, or its list's.
        projections: all of its projections, in the order in which they run.
        chosen: names of those to work on.
        stacked: the module holds stacks, and takes (hidden_states, top_k_index, top_k_weights).
    """

    name: str
    module: nn.Module
    layer: str
    projections: tuple[Projection, ...]
    chosen: frozenset[str]
    stacked: bool

    @property
    def experts(self) -> int:
        """How many experts."""
        return self.projections[0].experts

    def of_role(self, role: str) -> list[Projection]:
        """Projections of a role."""
        return [projection for projection in self.projections if projection.role == role]
