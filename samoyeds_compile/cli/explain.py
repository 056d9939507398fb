"""``samoyeds explain``: what the backend finds in a model, before anybody waits for weights or compilation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from samoyeds_compile.cli.output import AsJson, fail, show
from samoyeds_compile.report.explain import explain as explain_model

LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class BadTarget(Exception):
    """What the command line names is no model; the text says why and what to give."""


def explain(
    target: Annotated[str, typer.Argument(help="A config.json, a folder or model id with one, or script.py:function.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the input made for a configuration.")] = 32,
    layers: Annotated[int, typer.Option(min=0, help="Layers of a configuration that are looked at; 0: all.")] = 4,
    training: Annotated[bool, typer.Option("--training", help="With gradients, in training mode.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which MoE blocks a model has, what each becomes, and why not; exit with 1 if a block is left alone.

    A configuration of transformers is made a model without weights, so any size takes seconds; ids are looked up in the
    local cache only. A function of a script returns (model, inputs), inputs being a dictionary, or a tuple or a tensor.
    """
    try:
        with Console(stderr=True).status("tracing"):
            model, args, kwargs = _load(target, tokens, layers)
            with torch.set_grad_enabled(training):
                report = explain_model(
                    model.train(training) if isinstance(model, nn.Module) else model, *args, **kwargs
                )
    except BadTarget as error:
        raise typer.Exit(fail(str(error))) from error
    show(report, report.to_dict(), as_json)
    if len(report.rewritten) < len(report.blocks):
        raise typer.Exit(1)


def _load(target: str, tokens: int, layers: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A model and its inputs."""
    script, separator, function = target.rpartition(":")
    if separator and script.endswith(".py"):
        return _from_script(Path(script), function)
    model = _from_config(_config(target), layers)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    return model, (), {"input_ids": ids, "use_cache": False}


def _from_script(path: Path, function: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise BadTarget(f"{path} is no Python file; give script.py:function")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(made := getattr(module, function, None)):
        raise BadTarget(f"{path} has no function {function}")
    found = made()
    if not isinstance(found, tuple) or len(found) != 2:
        raise BadTarget(f"{path}:{function} returned a {type(found).__name__}; return (model, inputs)")
    model, inputs = found
    if isinstance(inputs, dict):
        return model, (), inputs
    return model, inputs if isinstance(inputs, tuple) else (inputs,), {}


def _config(target: str) -> Any:
    """A configuration of transformers."""
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise BadTarget(f"{target} needs transformers; pip install 'samoyeds-compile[hf]'") from error
    path = Path(target)
    try:
        if path.is_file():
            values = json.loads(path.read_text())
            return AutoConfig.for_model(**values)
        return AutoConfig.from_pretrained(target, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        remedy = "give a config.json, a folder or cached model id, or script.py:function"
        raise BadTarget(f"{target} is no configuration ({reason}); {remedy}") from error


def _from_config(config: Any, layers: int) -> nn.Module:
    """A causal language model without weights, of some layers."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    for name in LAYER_FIELDS:
        if layers and getattr(text, name, 0) > layers:
            setattr(text, name, layers)
    if layers and isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise BadTarget(f"no causal language model is made of this configuration: {error}") from error
    return model
