"""``samoyeds``: which commands there are, and how their errors become exit codes.

0: done. 1: done, and what was found is not as it should be (a block left alone, a spoiled cache entry). 2: the command
line, or what it names, is wrong.
"""

from __future__ import annotations

import sys

import typer

from samoyeds_compile.cli import bench, cache, convert, doctor, explain, schema
from samoyeds_compile.cli.output import fail
from samoyeds_compile.errors import SamoyedsError

app = typer.Typer(
    name="samoyeds",
    help="Look into the samoyeds backend of torch.compile.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("explain")(explain.explain)
app.command("bench")(bench.bench)
app.command("convert")(convert.convert)
app.command("doctor")(doctor.doctor)
app.command("schema")(schema.schema)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run the command that the arguments name."""
    try:
        app()
    except SamoyedsError as error:
        sys.exit(fail(str(error)))
