"""Find the expert projections of an eager model.

Two forms are known: modules that hold stacks of weights (transformers' ``use_experts_implementation``), and lists of
modules, one for each expert, with ``nn.Linear`` inside. Routers, attention and shared experts are in neither.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.projections import Block, Projection

Filter = Callable[[str, nn.Module], bool] | Collection[str] | None
"""Which expert parameters: a test of (parameter name, module that holds it), names, or all."""

STACKED = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What transformers' decorator leaves on a module with stacks of experts."""

DOWN = {"down_proj", "down", "w2", "wo", "fc2", "c_proj", "linear_2", "linear2"}
"""What the last projection of an expert is called."""


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
    layout = _layout(module)
    if layout is not None:
        yield Block(name, module, name, tuple(_stacked(name, module, layout)), frozenset(), stacked=True)
    elif isinstance(module, (nn.ModuleList, nn.ModuleDict)) and _are_experts(name, module):
        for key, expert in _with_linears(module):
            path = _path(name, key)
            yield Block(path, expert, name, tuple(_listed(path, expert)), frozenset(), stacked=False)


@dataclass(frozen=True)
class _Layout:
    """How a module stores its stacks, as transformers' ``use_experts_implementation`` says it."""

    gated: bool = True
    biased: bool = False
    transposed: bool = False
    concatenated: bool = True


def _layout(module: nn.Module) -> _Layout | None:
    """The layout of a module with stacks of experts; None of any other."""
    if all(hasattr(module, attribute) for attribute in STACKED) and hasattr(module, "down_proj"):
        return _Layout(*(bool(getattr(module, attribute)) for attribute in STACKED))
    return _Layout() if _looks_decorated(module) else None


def _looks_decorated(module: nn.Module) -> bool:
    """Whether a module that nobody decorated has the names, shapes and arguments of one with the default layout."""
    up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    arguments = list(inspect.signature(type(module).forward).parameters)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or up.dim() != 3 or down.dim() != 3:
        return False
    experts, rows, cols = down.shape
    alone = len(list(module.named_parameters(recurse=False))) == 2
    known = hasattr(module, "_apply_gate") or hasattr(module, "act_fn")
    return (
        alone and known and up.shape == (experts, 2 * cols, rows) and arguments[2:] == ["top_k_index", "top_k_weights"]
    )


def _stacked(name: str, module: nn.Module, layout: _Layout) -> Iterator[Projection]:
    up = "gate_up_proj" if layout.gated else "up_proj"
    for attribute, role in ((up, "up"), ("down_proj", "down")):
        runs = 2 if layout.gated and role == "up" else 1
        yield Projection(
            _path(name, attribute), module, attribute, role, stacked=True, transposed=layout.transposed, runs=runs,
            interleaved=runs == 2 and not layout.concatenated, bias=f"{attribute}_bias" if layout.biased else None,
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
