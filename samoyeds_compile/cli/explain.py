"""``samoyeds explain``: what the backend finds in a model, before anybody waits for weights or compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import nn

from samoyeds_compile.cli.output import AsJson, fail, show
from samoyeds_compile.cli.target import HELP, BadTarget, load
from samoyeds_compile.report.explain import explain_into


def explain(
    target: Annotated[str, typer.Argument(help=HELP)],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the input made for a configuration.")] = 32,
    layers: Annotated[int, typer.Option(min=0, help="Layers of a configuration that are looked at; 0: all.")] = 4,
    training: Annotated[bool, typer.Option("--training", help="With gradients, in training mode.")] = False,
    why: Annotated[bool, typer.Option("--why", help="Print only what could be better, and what to do.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Folder for the graphs as programs, and report.html.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which MoE blocks a model has, what each becomes, and why not; exit with 1 if a block is left alone.

    A configuration of transformers is made a model without weights, so any size takes seconds; ids are looked up in the
    local cache only. A function of a script returns (model, inputs), inputs being a dictionary, or a tuple or a tensor.
    """
    try:
        with Console(stderr=True).status("tracing"):
            model, args, kwargs = load(target, tokens, layers)
            if isinstance(model, nn.Module):
                model.train(training)
            with torch.set_grad_enabled(training):
                report = explain_into(dump, model, args, kwargs)
    except BadTarget as error:
        raise typer.Exit(fail(str(error))) from error
    show(report.why() if why else report, report.to_dict(), as_json)
    if len(report.rewritten) < len(report.blocks):
        raise typer.Exit(1)
