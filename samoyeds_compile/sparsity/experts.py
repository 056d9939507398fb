"""Find the expert projections of an eager model, and read their weights as matrices whatever their storage.

Two forms are known: modules that hold stacks of weights (transformers' ``use_experts_implementation``), and lists of
modules, one for each expert, with ``nn.Linear`` inside. Routers, attention and shared experts are in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError

Filter = Callable[[str, nn.Module], bool] | Collection[str] | None
"""Which expert parameters: a test of (parameter name, module that holds it), names, or all."""

STACKED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' decorator leaves on a module with stacks of experts."""

DOWN = {"down_proj", "down", "w2", "wo", "fc2", "c_proj", "linear_2", "linear2"}
"""What the last projection of an expert is called."""


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

    def matrix(self, stored: Tensor, expert: int) -> Tensor:
        """Matrix [rows, cols] of an expert out of a tensor stored like the parameter; gate rows before up rows."""
        return self._view(stored, expert).reshape(self.shape)

    def put(self, stored: Tensor, expert: int, matrix: Tensor) -> None:
        """Inverse of `matrix`: write it into ``stored``, in its dtype."""
        view = self._view(stored, expert)
        view.copy_(matrix.reshape(view.shape))

    def _view(self, stored: Tensor, expert: int) -> Tensor:
        """The expert's matrix as a view, [rows, cols] or [2, rows / 2, cols] out of interleaved storage."""
        matrix = stored[expert] if self.stacked else stored
        matrix = matrix.mT if self.transposed else matrix
        return matrix.unflatten(0, (-1, self.runs)).transpose(0, 1) if self.interleaved else matrix


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
        raise SparsityError(
            f"{type(model).__name__}: has no expert weights that are known; stacks of a transformers experts module, "
            "or nn.Linear in a ModuleList of experts of one structure, can be made sparse"
        )
    if filter_fn is not None and not callable(filter_fn):
        for name in sorted(set(filter_fn) - names):
            raise SparsityError(f"{name}: is no expert weight of the model; such are {', '.join(sorted(names)[:4])}")
    chosen = [_chosen(block, filter_fn) for block in found]
    chosen = [block for block in chosen if block.chosen]
    if not chosen:
        raise SparsityError(f"filter_fn: chooses none of the {len(names)} expert weights; {min(names)} is one")
    return chosen


def _chosen(block: Block, filter_fn: Filter) -> Block:
    def is_chosen(projection: Projection) -> bool:
        if filter_fn is None:
            return True
        return filter_fn(projection.name, projection.owner) if callable(filter_fn) else projection.name in filter_fn

    names = frozenset(projection.name for projection in block.projections if is_chosen(projection))
    return Block(block.name, block.module, block.layer, block.projections, names, block.stacked)


def _blocks_of(name: str, module: nn.Module) -> Iterator[Block]:
    if all(hasattr(module, attribute) for attribute in STACKED) and hasattr(module, "down_proj"):
        projections = tuple(_stacked(name, module))
        yield Block(name, module, name, projections, frozenset(), stacked=True)
    elif isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _are_experts(name, module):
        for key, expert in _with_linears(module):
            path = _path(name, key)
            yield Block(path, expert, name, tuple(_listed(path, expert)), frozenset(), stacked=False)


def _stacked(name: str, module: nn.Module) -> Iterator[Projection]:
    gated, biased, transposed, concatenated = (bool(getattr(module, attribute)) for attribute in STACKED)
    up = "gate_up_proj" if gated else "up_proj"
    for attribute, role in ((up, "up"), ("down_proj", "down")):
        runs = 2 if gated and role == "up" else 1
        yield Projection(
            _path(name, attribute), module, attribute, role, stacked=True, transposed=transposed, runs=runs,
            interleaved=runs == 2 and not concatenated, bias=f"{attribute}_bias" if biased else None,
        )  # fmt: skip


def _are_experts(name: str, modules: nn.Module) -> bool:
    """Whether a list holds experts: it is called so, and its members are alike and have linear layers."""
    words = f"{name.rsplit('.', 1)[-1]} {type(modules).__name__}".lower()
    experts = [expert for _, expert in _with_linears(modules)]
    if "expert" not in words or "shared" in name.lower() or len(experts) < 2:
        return False
    return len({(type(e), tuple((n, p.shape) for n, p in e.named_parameters())) for e in experts}) == 1


def _with_linears(modules: nn.Module) -> list[tuple[str, nn.Module]]:
    """Members with linear layers; NLLB has a dropout among its experts."""
    return [(key, e) for key, e in modules.named_children() if any(isinstance(m, nn.Linear) for m in e.modules())]


def _listed(path: str, expert: nn.Module) -> Iterator[Projection]:
    linears = [(name, m) for name, m in expert.named_modules() if isinstance(m, nn.Linear)]
    roles = _roles(linears)
    for name, linear in linears:
        bias = "bias" if linear.bias is not None else None
        owner = _path(path, name)
        yield Projection(_path(owner, "weight"), linear, "weight", roles[name], bias=bias)


def _roles(linears: list[tuple[str, nn.Linear]]) -> dict[str, str]:
    """Roles of the linear layers of one expert: one ``down`` takes what all others, the ``up``, give.

    Where names say nothing, ``down`` is the last one whose shape allows it. A wrong guess does no harm: only a change
    of the order of features needs roles, and that is tried first.
    """
    named = [(name, m) for name, m in linears if name.rsplit(".", 1)[-1] in DOWN]
    fitting = [(name, m) for name, m in named or linears if _takes_what_others_give(m, [o for _, o in linears])]
    if not fitting or len(linears) not in (2, 3):
        return {name: "other" for name, _ in linears}
    return {name: "down" if name == fitting[-1][0] else "up" for name, _ in linears}


def _takes_what_others_give(linear: nn.Linear, linears: list[nn.Linear]) -> bool:
    others = [other for other in linears if other is not linear]
    return all(o.out_features == linear.in_features and o.in_features == linear.out_features for o in others)


def _path(prefix: str, name: str) -> str:
    return ".".join(part for part in (prefix, name) if part)


def require_prunable(model: nn.Module, blocks: list[Block]) -> None:
    """Check the chosen weights before anything changes.

    Raises:
        SparsityError: a weight is packed already, no plain floating tensor, on the meta device, shared with another
            module, or has values that are infinite or NaN.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for block in blocks:
        for projection in block.projections:
            if projection.name in block.chosen:
                _require_prunable(projection, names)


def _require_prunable(projection: Projection, names: dict[int, list[str]]) -> None:
    name, weight = projection.name, projection.parameter
    dims = 3 if projection.stacked else 2
    if type(weight) not in (nn.Parameter, Tensor):
        raise SparsityError(f"{name}: is a {type(weight).__name__}; pass dense weights (densify_ undoes packing)")
    if type(weight.data) is not Tensor:
        raise SparsityError(
            f"{name}: holds a {type(weight.data).__name__}; pass dense weights (densify_ undoes packing)"
        )
    if not weight.dtype.is_floating_point or weight.element_size() < 2 or weight.dim() != dims:
        raise SparsityError(f"{name}: is {weight.dtype} {list(weight.shape)}; pass {dims}-D weights of 16 bits or more")
    if weight.is_meta:
        raise SparsityError(f"{name}: is on the meta device; load the weights first")
    others = [other for other in names.get(id(weight), []) if other != name]
    if others:
        raise SparsityError(f"{name}: is the same parameter as {others[0]}; untie them first")
    if not bool(torch.isfinite(weight).all()):
        raise SparsityError(f"{name}: has values that are infinite or NaN; repair the weights first")
