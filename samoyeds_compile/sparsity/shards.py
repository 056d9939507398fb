"""A checkpoint in several files: each is one that `save_sparse` could have written, and an index says what is where.

The index is that of transformers, ``model.safetensors.index.json``. The parts of a packed tensor are in one file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.errors import CheckpointError
from samoyeds_compile.sparsity.checkpoint import described, load_file, stored, write
from samoyeds_compile.sparsity.tensor import PackedTensor

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 1 << 30
"""A file is written once so much waits for it; only a larger tensor makes a larger file."""


class ShardWriter:
    """Writes tensors into files of a folder as they come, and holds what fills no file yet."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.files: list[str] = []
        self.total_bytes = 0
        self._where: dict[str, str] = {}
        self._tensors: dict[str, Tensor] = {}
        self._forms: dict[str, Any] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of a state dict, at the latest on `finish`."""
        tensors = stored(name, tensor)
        size = sum(t.nbytes for t in tensors.values())
        if self._tensors and sum(t.nbytes for t in self._tensors.values()) + size > self.shard_bytes:
            self._write()
        self._tensors |= tensors
        self.total_bytes += size
        if isinstance(tensor, PackedTensor):
            self._forms[name] = described(tensor)

    def finish(self) -> None:
        """Write what is held, and the index."""
        if self._tensors:
            self._write()
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self._where}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write(self) -> None:
        file = f"model-{len(self.files) + 1:05}.safetensors"
        write(self._tensors, self._forms, self.folder / file)
        self.files.append(file)
        self._where |= dict.fromkeys(self._tensors, file)
        self._tensors, self._forms = {}, {}


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written; nothing is left of it after an exception.

    Raises:
        CheckpointError: the name is taken.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists; give the name of a new folder")
    making = folder.parent / f"making-{folder.name}-{os.getpid()}"
    making.mkdir(parents=True)
    try:
        yield making
        making.rename(folder)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def load_folder(folder: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read what a `ShardWriter` wrote; see `load_sparse`.

    Raises:
        CheckpointError: there is no index, or it or a file is damaged or missing.
    """
    state: dict[str, Tensor] = {}
    where = read_index(folder / INDEX)
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: has no {file}, which is in its index; copy or download it again")
        state |= load_file(folder / file, device)
    packed = {name for name, tensor in state.items() if isinstance(tensor, PackedTensor)}
    lost = sorted(name for name in where if name not in state and name.rpartition(".")[0] not in packed)
    if lost:
        raise CheckpointError(f"{folder}: its files lack {lost[0]}, which is in the index; copy or download them again")
    return state


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by the tensor's name.

    Raises:
        CheckpointError: there is no index, it is damaged, or it names a file elsewhere.
    """
    try:
        where = dict(json.loads(path.read_text())["weight_map"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is not there; give a folder of safetensors files with an index") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is no index ({error!r}); copy or download it again") from error
    for file in where.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: names the file {file!r}; the files of a checkpoint lie beside their index")
    return where
