"""Checkpoints of models with packed weights: safetensors files in canonical form, independent of any kernel's order.

A packed tensor ``name`` is stored as ``name.values``, ``name.metadata`` and ``name.selection``, everything else as it
is. The file's metadata says which tensors are packed and how: a format version, and the `Form` of each. A folder of
such files with an index is a checkpoint too (`samoyeds_compile.sparsity.shards`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import CheckpointError
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.pack import packed_shapes
from samoyeds_compile.sparsity.tensor import Form, PackedTensor

VERSION = 1
KEY = "samoyeds"
"""Key in the file's metadata."""


def save_sparse(state: nn.Module | Mapping[str, Tensor], path: str | Path) -> None:
    """Write a model's state, or a state dict, to a safetensors file.

    Args:
        state: a module or a state dict; packed weights in it stay packed, shared tensors are written for each name.
        path: of the file.
    """
    tensors: dict[str, Tensor] = {}
    forms: dict[str, Any] = {}
    for name, tensor in (state.state_dict() if isinstance(state, nn.Module) else state).items():
        tensors |= stored(name, tensor)
        if isinstance(tensor, PackedTensor):
            forms[name] = described(tensor)
    write(tensors, forms, path)


def stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a file has of one tensor of a state dict, by name; dense ones are copies that share nothing."""
    if not isinstance(tensor, PackedTensor):
        return {name: tensor.detach().clone(memory_format=torch.contiguous_format)}
    packed = tensor.packed
    parts = {"values": packed.values, "metadata": packed.metadata, "selection": packed.selection}
    return {f"{name}.{part}": t.detach().contiguous() for part, t in parts.items() if t is not None}


def described(tensor: PackedTensor) -> dict[str, Any]:
    """What a file says of a packed tensor, for `write`."""
    return {key: value for key, value in dataclasses.asdict(tensor.form).items() if key != "strips"}


def write(tensors: dict[str, Tensor], forms: Mapping[str, Any], path: str | Path) -> None:
    """Write a file of what `stored` gave, with what `described` says of each packed tensor in it."""
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata={KEY: json.dumps({"version": VERSION, "packed": forms})})


def load_file(path: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read one file.

    Raises:
        CheckpointError: the file is damaged, of another version, or no file of this kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            packed = _header(file.metadata() or {}, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy or download it again") from error
    state: dict[str, Tensor] = {}
    for name, fields in packed.items():
        parts = {part: tensors.pop(f"{name}.{part}", None) for part in ("values", "metadata", "selection")}
        state[name] = _packed(name, parts, _form(name, fields, path), path)
    return {**tensors, **state}


def _header(metadata: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """What is packed, by name."""
    if KEY not in metadata:
        raise CheckpointError(f"{path}: holds no packed weights; load it as any other safetensors file")
    try:
        header = json.loads(metadata[KEY])
        version, packed = header["version"], dict(header["packed"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its description is damaged ({error!r}); copy or download it again") from error
    if version != VERSION:
        raise CheckpointError(f"{path}: has format version {version!r}, this release reads {VERSION}; update Samoyeds")
    return packed


def _form(name: str, fields: Any, path: str | Path) -> Form:
    try:
        return Form(**{**fields, "config": SparsityConfig(**fields["config"])})
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the description of {name} is damaged ({error}); copy it again") from error


def _packed(name: str, parts: dict[str, Tensor | None], form: Form, path: str | Path) -> PackedTensor:
    """The tensor, if all its parts are there and have the shapes, dtypes and values that they must have."""
    problem = _problem(parts, form)
    if problem is not None:
        raise CheckpointError(f"{path}: {name} {problem}; the file is damaged, copy or download it again")
    values, metadata, selection = parts["values"], parts["metadata"], parts["selection"]
    assert values is not None
    return PackedTensor(values, metadata, selection, form).arranged()


def _problem(parts: dict[str, Tensor | None], form: Form) -> str | None:
    wanted = packed_shapes(form.rows, form.cols, form.config)
    dtypes = {"metadata": torch.int16, "selection": torch.uint8}
    values = parts["values"]
    for part, tensor in parts.items():
        if (tensor is None) != (wanted[part] is None):
            return f"has {'no' if tensor is None else 'unexpected'} {part}"
        if tensor is None:
            continue
        if tuple(tensor.shape[-2:]) != wanted[part] or (values is not None and tensor.shape[:-2] != values.shape[:-2]):
            return f"has {part} of shape {tuple(tensor.shape)}"
        if tensor.dtype != dtypes.get(part, tensor.dtype) or (part == "values" and not tensor.is_floating_point()):
            return f"has {part} of dtype {tensor.dtype}"
    metadata, selection = parts["metadata"], parts["selection"]
    if selection is not None and not _are_sub_rows(selection, form.config):
        return "selects sub-rows that do not exist, or one twice"
    if metadata is not None and not _ascending(metadata):
        return "has metadata whose positions do not ascend"
    return None


def _are_sub_rows(selection: Tensor, config: SparsityConfig) -> bool:
    """Whether the n sub-rows of every block are in 0 .. m-1 and ascend."""
    blocks = selection.to(torch.int16).unflatten(-2, (-1, config.n))
    return bool((selection < config.m).all()) and bool((blocks.diff(dim=-2) > 0).all())


def _ascending(metadata: Tensor) -> bool:
    """Whether the two positions of every group of four differ and stand in order."""
    words = metadata.to(torch.int32)
    return all(bool((((words >> at) & 3) < ((words >> (at + 2)) & 3)).all()) for at in range(0, 16, 4))
