"""Lists of modules, one for each expert, with ``nn.Linear`` inside."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from samoyeds_compile.sparsity.projections import Block, Projection, path

DOWN = {"down_proj", "down", "w2", "wo", "fc2", "c_proj", "linear_2", "linear2"}
"""What the last projection of an expert is called."""


def listed(name: str, modules: nn.Module) -> list[Block]:
    """A block for each expert of a list."""
    if not isinstance(modules, (nn.ModuleList, nn.ModuleDict)) or not _are_experts(name, modules):
        return []
    named = [(path(name, key), expert) for key, expert in _with_linears(modules)]
    return [Block(each, expert, name, tuple(_projections(each, expert)), frozenset()) for each, expert in named]


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


def _projections(prefix: str, expert: nn.Module) -> Iterator[Projection]:
    linears = [(name, m) for name, m in expert.named_modules() if isinstance(m, nn.Linear)]
    roles = _roles(linears)
    for name, linear in linears:
        bias = "bias" if linear.bias is not None else None
        yield Projection(path(prefix, name, "weight"), linear, "weight", roles[name], bias=bias)


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
