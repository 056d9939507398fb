"""``samoyeds convert``: a checkpoint of transformers to one with packed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from samoyeds_compile.cli.output import AsJson, fail, show
from samoyeds_compile.cli.target import BadTarget, read_config
from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import SparsityConfig, save_sparse, sparsify_


def convert(
    checkpoint: Annotated[str, typer.Argument(help="A folder, or the id of a model in the local cache.")],
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    pattern: Annotated[str, typer.Option(help="n:m:vector; 1:1:32 is plain 2:4.")] = "1:2:32",
    refine: Annotated[bool, typer.Option("--refine", help="Choose a second time, where that helps.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prune the experts of a checkpoint by magnitude and write them packed; this changes what the model computes.

    The checkpoint is loaded as transformers loads it, in the dtype that it has, and its experts are packed one after
    the other, each dense one released. With a calibration, which keeps more of the model's quality, use `sparsify_`.
    Load the file with `samoyeds_compile.sparsity.load_sparse_`.
    """
    try:
        config = _pattern(pattern)
        read_config(checkpoint)
        from transformers import AutoModelForCausalLM

        with Console(stderr=True).status("loading"):
            model = AutoModelForCausalLM.from_pretrained(checkpoint, local_files_only=True, dtype="auto")
        report = sparsify_(model, config, method="magnitude", refine=refine, progress=not quiet)
        with Console(stderr=True).status("writing"), torch.no_grad():
            save_sparse(model, output)
    except (BadTarget, SparsityError, OSError, ValueError) as error:
        raise typer.Exit(fail(str(error))) from error
    show(report.table(), {**report.to_dict(), "file": str(output), "file_bytes": output.stat().st_size}, as_json)


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
