"""Load a checkpoint with packed weights, a file or a folder of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import CheckpointError
from samoyeds_compile.sparsity.checkpoint import load_file
from samoyeds_compile.sparsity.shards import load_folder
from samoyeds_compile.sparsity.tensor import PackedTensor


def load_sparse(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read what `save_sparse` wrote, or the folder that ``samoyeds convert`` wrote.

    Returns:
        A state dict with `PackedTensor` where weights are packed.

    Raises:
        CheckpointError: a file is damaged, missing, of another version, or no file of this kind.
    """
    path = Path(path)
    return load_folder(path, device) if path.is_dir() else load_file(path, device)


def load_sparse_(model: nn.Module, path: str | Path) -> None:
    """Load a file into a model, in place; parameters that are packed in the file become packed in the model.

    Raises:
        CheckpointError: the file cannot be read, or is of another model; the model is unchanged then.
    """
    state, own = load_sparse(path), model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(f"{path}: lacks {missing[:3]} and has {unknown[:3]} besides; load it into its own model")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
            raise CheckpointError(f"{path}: {name} is {shapes}; load it into the model it was made of")
    for name, tensor in state.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(tensor, PackedTensor):
            setattr(module, leaf, nn.Parameter(tensor.to(own[name].device), requires_grad=False))
        else:
            getattr(module, leaf).data.copy_(tensor)
