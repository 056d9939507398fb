"""Find the MoE modules of a model that no graph contains, so that the report can say so."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import nn

from samoyeds_compile.integrations.families import family_of
from samoyeds_compile.report.advice import remedy_for_block
from samoyeds_compile.report.model import BlockReport, Report
from samoyeds_compile.report.remedies import remedy_of


def find_uncaptured(model: nn.Module, report: Report) -> list[BlockReport]:
    """Entries for the modules that hold experts and are in no block of the report."""
    missing = [found for found in expert_modules(model) if not _is_seen(found[0], report.blocks)]
    return [_entry(path, _owner(model, path, module), module, experts, report) for path, module, experts in missing]


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """(path, module, E) of every module that looks like a set of experts.

    It is of a class that `integrations.transformers` knows, or owns two or more stacks [E, rows, cols], or is a list
    named after experts whose members are alike.
    """
    for path, module in model.named_modules():
        family = family_of(module)
        if family is not None and family.count is not None:
            yield path, module, family.count(module)
            continue
        stacks = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
        if len(stacks) >= 2 and len(set(stacks)) == 1:
            yield path, module, stacks[0]
        elif _is_list_of_experts(path, module):
            yield path, module, len(list(module.children()))


def _is_list_of_experts(path: str, module: nn.Module) -> bool:
    members = list(module.children())
    named = isinstance(module, nn.ModuleList) and "expert" in path.rpartition(".")[2].lower()
    return named and len(members) > 1 and len({type(member) for member in members}) == 1


def _is_seen(path: str, blocks: list[BlockReport]) -> bool:
    """A block names its module from the root of the frame that was traced, which may be a submodule of the model."""
    return any(
        path == block.module
        or any(name.startswith(f"{path}.") for name in block.parameters)
        or (block.module and path.endswith(f".{block.module}"))
        for block in blocks
    )


def _owner(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The module whose code runs the experts: of a list the one that has it."""
    return model.get_submodule(path.rpartition(".")[0]) if isinstance(module, nn.ModuleList) else module


def _entry(path: str, owner: nn.Module, module: nn.Module, experts: int, report: Report) -> BlockReport:
    reason = _reason(module, report)
    source, remedy = _class_source(owner), remedy_of(module) or remedy_for_block(reason)
    return BlockReport(path, source, family="", rewritten=False, reason=reason, remedy=remedy, experts=experts)


def _class_source(module: nn.Module) -> str:
    """``file:line: class`` of the module's class, as far as Python knows it."""
    name = f"class {type(module).__name__}"
    try:
        return f"{inspect.getsourcefile(type(module))}:{inspect.getsourcelines(type(module))[1]}: {name}"
    except (OSError, TypeError):  # defined in a console, or in a file that was not imported by name
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        return name if code is None else f"{code.co_filename}:{code.co_firstlineno}: forward of {name}"


def _reason(module: nn.Module, report: Report) -> str:
    if remedy := remedy_of(module):
        return f"reached no graph: {remedy}"
    if report.breaks:
        return f"reached no graph: {report.breaks[0][0]}; {report.breaks[0][1]}"
    return "no surface pattern knows this way of running experts, or the inputs did not reach it"
