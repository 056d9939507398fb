"""`convert_checkpoint`: a checkpoint of transformers to one with packed experts, a few parameters at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samoyeds_compile.errors import CheckpointError
from samoyeds_compile.sparsity.checks import require_prunable
from samoyeds_compile.sparsity.config import SparsityConfig
from samoyeds_compile.sparsity.dense_checkpoint import DenseCheckpoint, opened
from samoyeds_compile.sparsity.experts import find_blocks
from samoyeds_compile.sparsity.job import Job
from samoyeds_compile.sparsity.progress import progress_bar
from samoyeds_compile.sparsity.projections import Block
from samoyeds_compile.sparsity.prune import method_of
from samoyeds_compile.sparsity.report import ParameterReport, SparsityReport
from samoyeds_compile.sparsity.shards import SHARD_BYTES, ShardWriter, made_whole

if TYPE_CHECKING:
    from rich.progress import Progress


def convert_checkpoint(
    checkpoint: str,
    model_config: Any,
    output: str | Path,
    config: SparsityConfig,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> SparsityReport:
    """Prune the experts of a checkpoint by magnitude and write a folder with all weights, those of experts packed.

    The result is that of `sparsify_` with ``method="magnitude"`` and `save_sparse`, but the model is never whole in
    memory. Held at a time are one dense parameter, or the experts of one layer where each is a module of its own, the
    tensors that it is made of, and what waits for its file to be full.

    Args:
        checkpoint: a folder, or the id of a model in the local cache; safetensors files.
        model_config: its configuration, of transformers.
        output: a new folder, for `load_sparse` and `load_sparse_`. It appears when all is written.
        config: the pattern.
        shard_bytes: how large a file may be, unless one tensor is larger.
        progress: show a progress bar.

    Raises:
        CheckpointError: the checkpoint can't be read or does not fit the model, or ``output`` exists.
        SparsityError: the model has no experts, or one of their weights can't be pruned.
    """
    output = Path(output)
    with opened(checkpoint) as slices, made_whole(output) as folder, progress_bar(progress) as bar:
        source = DenseCheckpoint.of(slices, model_config)
        blocks = find_blocks(source.model)
        writer = ShardWriter(folder, shard_bytes)
        reports = _convert(source, blocks, config, writer, bar)
        writer.finish()
    order = {name: at for at, name in enumerate(p.name for block in blocks for p in block.projections)}
    found = tuple(sorted(reports, key=lambda report: order[report.name]))
    return SparsityReport("magnitude", config, found, tuple(_notes(source)))


def _convert(
    source: DenseCheckpoint, blocks: list[Block], config: SparsityConfig, writer: ShardWriter, bar: Progress
) -> list[ParameterReport]:
    """Read, pack, write and release one part after the other."""
    parts, packings = _parts(source, blocks)
    task = bar.add_task("convert", total=sum(map(source.count, source.sources)))
    job = Job(source.model, config, method_of("magnitude", False, False), False, None, set(), progress_bar(shown=False))
    reports: list[ParameterReport] = []
    missing = set(source.own)
    for part, targets in parts.items():
        loaded = source.load(targets)
        if part in packings:
            _require_loaded({p for block in packings[part] for p in block.chosen} - loaded.keys())
            require_prunable(source.model, packings[part])
            reports += job.run([packings[part]])[0]
        for name, names in loaded.items():
            for each in names:
                writer.add(each, source.value(name))
            missing.difference_update(names)
            source.release(name)
        bar.advance(task, sum(map(source.count, targets)))
    _require_loaded(missing)
    return reports


def _parts(source: DenseCheckpoint, blocks: list[Block]) -> tuple[dict[str, list[str]], dict[str, list[Block]]]:
    """What to load together, and what to pack of it: each parameter alone, but lists of experts by layer."""
    part_of: dict[str, str] = {}
    packings: dict[str, list[Block]] = {}
    for block in blocks:
        if any(projection.stacked for projection in block.projections):
            for name in block.chosen:
                packings[name] = [replace(block, chosen=frozenset({name}))]
        else:
            part_of |= dict.fromkeys(block.chosen, block.layer)
            packings.setdefault(block.layer, []).append(block)
    parts: dict[str, list[str]] = {}
    for target in source.sources:
        parts.setdefault(part_of.get(target, target), []).append(target)
    return parts, packings


def _require_loaded(missing: set[str]) -> None:
    if missing:
        problem = (
            f"the checkpoint lacks it, and {len(missing) - 1} more" if len(missing) > 1 else "the checkpoint lacks it"
        )
        raise CheckpointError(f"{min(missing)}: {problem}; give a checkpoint of the whole model")


def _notes(source: DenseCheckpoint) -> Iterator[str]:
    if source.unknown:
        yield f"{len(source.unknown)} tensors have no place in the model and are left out, {source.unknown[0]} for one"
