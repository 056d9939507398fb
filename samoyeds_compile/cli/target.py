"""What a command is pointed at: a configuration, a folder or model id with one, or a function in a script."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HELP = "A config.json, a folder or model id with one, or script.py:function."

Loaded = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A model and its positional and keyword inputs."""


class BadTarget(Exception):
    """What the command line names is no model; the text says why and what to give."""


def load(target: str, tokens: int, layers: int, device: str = "meta") -> Loaded:
    """A model and its inputs.

    Args:
        target: as `HELP` says; ids are looked up in the local cache only.
        tokens: of the input made for a configuration.
        layers: of a configuration that are made; 0 for all.
        device: where a configuration's model is made, with random weights; ``meta`` has none.

    Raises:
        BadTarget: it names no model.
    """
    script, separator, function = target.rpartition(":")
    if separator and script.endswith(".py"):
        return _from_script(Path(script), function)
    model = _from_config(read_config(target), layers, device)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    return model, (), {"input_ids": ids, "use_cache": False}


def _from_script(path: Path, function: str) -> Loaded:
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


def read_config(target: str) -> Any:
    """A configuration of transformers.

    Raises:
        BadTarget: there is none, or transformers is not installed.
    """
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


def _from_config(config: Any, layers: int, device: str) -> nn.Module:
    """A causal language model of some layers."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    for name in LAYER_FIELDS:
        if layers and getattr(text, name, 0) > layers:
            setattr(text, name, layers)
    if layers and isinstance(getattr(text, "layer_types", None), list):
        text.layer_types = text.layer_types[:layers]
    try:
        with torch.device(device):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise BadTarget(f"no causal language model is made of this configuration: {error}") from error
    return model
