"""A checkpoint of transformers, read a few parameters at a time.

Its tensors get their names, order and dtype in the model as transformers gives them when it loads a model (source:
``core_model_loading.py``), but only those that are asked for are read; the rest of the model stays on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.errors import CheckpointError
from samoyeds_compile.sparsity.shards import INDEX, read_index

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names that safetensors has for dtypes that weights are computed in."""


@contextmanager
def opened(checkpoint: str) -> Iterator[dict[str, Any]]:
    """What the safetensors files of a checkpoint have, by name; a tensor is read where it is indexed.

    Args:
        checkpoint: a folder, or the id of a model in the local cache.

    Raises:
        CheckpointError: it has no safetensors files, or one is missing or damaged, now or when it is read.
    """
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        slices: dict[str, Any] = {}
        try:
            for path in _files(checkpoint):
                file = stack.enter_context(safe_open(path, framework="pt"))
                slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            yield slices
        except SafetensorError as error:
            raise CheckpointError(f"{checkpoint}: cannot be read ({error}); copy or download it again") from error


def _files(checkpoint: str) -> list[str]:
    """Its one file, or those of its index."""
    if (single := _cached(checkpoint, "model.safetensors")) is not None:
        return [single]
    if (index := _cached(checkpoint, INDEX)) is None:
        remedy = "load it with transformers, then sparsify_ and save_sparse"
        raise CheckpointError(f"{checkpoint}: has neither model.safetensors nor {INDEX}; {remedy}")
    names = sorted(set(read_index(Path(index)).values()))
    found = {name: _cached(checkpoint, name) for name in names}
    for name, path in found.items():
        if path is None:
            raise CheckpointError(f"{checkpoint}: has no {name}, which is in its index; copy or download it again")
    return [path for path in found.values() if path is not None]


def _cached(checkpoint: str, name: str) -> str | None:
    from transformers.utils.hub import cached_file

    try:
        return cached_file(checkpoint, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class DenseCheckpoint:
    """What the files have, and the model that it belongs to.

    Attributes:
        slices: as `opened` gives them.
        model: on the meta device, but for what is loaded.
        own: its state dict on the meta device; tied parameters are one.
        sources: which tensors of the files make a parameter, by its name. One of several that are made together
            stands for all of them.
        unknown: tensors of the files that the model has no place for.
        how: how transformers is to load, a ``LoadStateDictConfig``.
    """

    slices: Mapping[str, Any]
    model: Any
    own: dict[str, Tensor]
    sources: dict[str, list[str]]
    unknown: list[str]
    how: Any

    @classmethod
    def of(cls, slices: Mapping[str, Any], config: Any) -> DenseCheckpoint:
        """Find the place of every tensor.

        Args:
            slices: as `opened` gives them.
            config: of transformers.

        Raises:
            CheckpointError: weights are quantized.
        """
        from transformers import AutoModelForCausalLM
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.modeling_utils import LoadStateDictConfig

        if getattr(config, "quantization_config", None) is not None:
            raise _quantized(config.name_or_path)
        dtype = _dtype(slices, config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).to("meta")
        mapping: list[Any] = list(get_model_conversion_mapping(model))
        how = LoadStateDictConfig(dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping)
        own = model.state_dict(keep_vars=True)
        sources: dict[str, list[str]] = {}
        for name in slices:
            sources.setdefault(_target(name, model, own, mapping), []).append(name)
        unknown = [name for target in sources.keys() - own.keys() for name in sources.pop(target)]
        for target, names in sources.items():
            for name in names if own[target].is_floating_point() else ():
                if slices[name].get_dtype() not in FLOATS:
                    raise _quantized(name)
        return cls(slices, model, own, sources, sorted(unknown), how)

    def count(self, target: str) -> int:
        """How many values of the files make a parameter."""
        return sum(torch.Size(self.slices[name].get_shape()).numel() for name in self.sources[target])

    def load(self, targets: list[str]) -> dict[str, list[str]]:
        """Read some parameters into the model.

        Returns:
            All that are loaded now, and the names that each has in a state dict.

        Raises:
            CheckpointError: a tensor does not fit the model.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        wanted = {name: self.slices[name] for target in targets for name in self.sources[target]}
        with _no_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, wanted, self.how)
        for name, found, size in info.mismatched_keys:
            raise CheckpointError(
                f"{name}: is {tuple(found)} instead of {tuple(size)}; give the checkpoint's own config"
            )
        for name, problem in info.conversion_errors.items():
            raise CheckpointError(f"{name}: cannot be made of the checkpoint's tensors ({problem}); download it again")
        loaded = [name for name, tensor in self.model.state_dict().items() if not tensor.is_meta]
        return {name: self._names(name) for name in loaded}

    def _names(self, name: str) -> list[str]:
        """Itself, and those tied to it that the files have no tensor for."""
        tied = [other for other, tensor in self.own.items() if tensor is self.own[name]]
        return [other for other in tied if other == name or other not in self.sources]

    def value(self, name: str) -> Tensor:
        """A parameter or buffer as it is in the model."""
        owner, _, leaf = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(owner), leaf)
        return found

    def release(self, name: str) -> None:
        """Put a parameter or buffer back on the meta device."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(owner), leaf, self.own[name])


def _quantized(name: str) -> CheckpointError:
    remedy = "load it dequantized with transformers, then sparsify_ and save_sparse"
    return CheckpointError(f"{name}: is quantized, and packing needs dense weights; {remedy}")


def _dtype(slices: Mapping[str, Any], config: Any) -> torch.dtype:
    """What transformers takes for ``dtype="auto"``: the configuration's, or that of the first floating tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    found = (FLOATS.get(tensor.get_dtype()) for tensor in slices.values())
    return next((dtype for dtype in found if dtype is not None), torch.get_default_dtype())


def _target(name: str, model: Any, own: dict[str, Tensor], mapping: list[Any]) -> str:
    """The parameter that a tensor of the files becomes, or becomes part of."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    target: str = rename_source_key(name, renamings, converters, model.base_model_prefix, own)[0]
    if target not in own and name in own:
        target = name
    return target


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of transformers: one for each parameter says nothing."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
