"""`explain`: run a model once, only to say what the backend finds in it and why it leaves what it leaves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samoyeds_compile.report.model import Report
from samoyeds_compile.report.remedies import remedy_for
from samoyeds_compile.report.uncaptured import find_uncaptured


def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
    """Say which MoE blocks a model has, what each would become, and why not.

    Runs ``model(*args, **kwargs)`` once, with the graphs rewritten and validated but not compiled, so it takes about
    as long as a few eager calls. Like `torch._dynamo.explain` it resets Dynamo before and after: functions compiled
    earlier are compiled again on their next call. The random state is left as it was.

    Args:
        model: a module or a function; an already compiled module is unwrapped.
        *args: positional inputs of the model.
        **kwargs: keyword inputs of the model.

    Returns:
        The report; print it, or read its ``blocks``, ``graphs``, ``breaks`` and ``to_json()``.
    """
    return explain_into(None, model, args, kwargs)


def explain_into(dump: Path | None, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Report:
    """The same, with the graphs in a dump folder; its ``report.html`` says all that the report does."""
    from torch._dynamo.utils import counters

    model = getattr(model, "_orig_mod", model)
    report = Report()
    options: dict[str, Any] = {"base": "eager", "report": report} | ({} if dump is None else {"dump": dump})
    if _is_meta(model):
        options["validate"] = False
        report.notes.append("the model has no weights (meta device), so rewrites were not validated")
    torch._dynamo.reset()
    before = Counter(counters["graph_break"])
    try:
        with torch.random.fork_rng():
            run: Any = torch.compile(model, backend="samoyeds", options=options)
            run(*args, **kwargs)
        breaks = Counter(counters["graph_break"]) - before
    finally:
        torch._dynamo.reset()
    report.breaks += _explained(report, breaks, model)
    _mend_breaks_first(report)
    if isinstance(model, nn.Module):
        report.uncaptured += find_uncaptured(model, report)
    if any(graph.dump for graph in report.graphs):
        _complete(Path(next(graph.dump for graph in report.graphs if graph.dump)).parent, report)
    return report


def _complete(folder: Path, report: Report) -> None:
    """What only a look at the whole model shows, in the reports of a dump folder."""
    from samoyeds_compile.report.dump import write_reports

    whole = report.to_dict()
    write_reports(folder, **{name: whole[name] for name in ("uncaptured", "breaks", "notes")})


def _mend_breaks_first(report: Report) -> None:
    """What is left of a block behind a graph break writes to what was made before it; the break is what matters."""
    for block in report.blocks if report.breaks else ():
        if block.reason == "the block writes to one of its inputs":
            block.remedy = "the graph breaks inside the block; mend that first"


def _is_meta(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(parameter.is_meta for parameter in model.parameters())


def _explained(report: Report, counted: Mapping[str, int], model: Any) -> list[tuple[str, str]]:
    """Each distinct graph break with what to do about it; the graphs know where, the counters know all."""
    found = {(_first_line(g.break_reason), g.break_source) for g in report.graphs if g.break_reason}
    placed = {reason for reason, _ in found}
    found |= {(_first_line(reason), "") for reason in counted if _first_line(reason) not in placed}
    return [(f"{reason} ({where})" if where else reason, remedy_for(reason, model)) for reason, where in sorted(found)]


def _first_line(reason: str) -> str:
    """The title of Dynamo's message, with its explanation but without hints and links."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    lines = [re.sub(r" at 0x[0-9a-f]+", "", line) for line in lines]
    kept = [line for line in lines if not line.startswith(("Hint:", "Developer debug context", "For more details"))]
    return " ".join(kept[:2])
