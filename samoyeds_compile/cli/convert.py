"""``samoyeds convert``: a checkpoint of transformers to one with packed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samoyeds_compile.cli.output import AsJson, fail, show
from samoyeds_compile.cli.target import BadTarget, read_config
from samoyeds_compile.errors import CheckpointError, SparsityError
from samoyeds_compile.sparsity import SparsityConfig


def convert(
    checkpoint: Annotated[str, typer.Argument(help="A folder, or the id of a model in the local cache.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    pattern: Annotated[str, typer.Option(help="n:m:vector; 1:1:32 is plain 2:4.")] = "1:2:32",
    shard_mib: Annotated[int, typer.Option(min=1, help="MiB of a file, unless one tensor has more.")] = 1024,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prune the experts of a checkpoint by magnitude and write them packed; this changes what the model computes.

    Tensors are read, packed and written one parameter after the other, in the dtype that transformers loads them in,
    so the model need not fit into memory. With a calibration, which keeps more of its quality, use `sparsify_`.
    Load the folder with `samoyeds_compile.sparsity.load_sparse_`.
    """
    try:
        config, model_config = _pattern(pattern), read_config(checkpoint)
        from samoyeds_compile.sparsity.convert import convert_checkpoint

        report = convert_checkpoint(
            checkpoint, model_config, output, config, shard_bytes=shard_mib << 20, progress=not quiet
        )
    except (BadTarget, CheckpointError, SparsityError, OSError, ValueError) as error:
        raise typer.Exit(fail(str(error))) from error
    sizes = {path.name: path.stat().st_size for path in sorted(output.iterdir())}
    show(report.table(), {**report.to_dict(), "folder": str(output), "file_bytes": sizes}, as_json)


def _pattern(text: str) -> SparsityConfig:
    """``n:m:vector`` as a pattern.

    Raises:
        BadTarget: it is none.
    """
    numbers = text.split(":")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise BadTarget(f"--pattern is {text}; give n:m:vector, such as 1:2:32")
    n, m, vector = map(int, numbers)
    return SparsityConfig(n, m, vector)
