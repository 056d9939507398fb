"""``samoyeds cache``: what compiled kernels are there, whether they are sound, and away with them."""

from __future__ import annotations

from typing import Any

import typer
from rich.table import Table
from rich.text import Text

from samoyeds_codegen import build
from samoyeds_codegen.errors import KernelError
from samoyeds_compile.cli.output import AsJson, fail, show

app = typer.Typer(help="Compiled kernels of this user.", no_args_is_help=True)


def entries() -> list[build.Entry]:
    """All of them; ends the command if there is no folder that may be used."""
    try:
        return build.entries()
    except KernelError as error:
        raise typer.Exit(fail(str(error))) from error


@app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """List compiled kernels."""
    found = entries()
    show(_table(found), [_data(entry) for entry in found], as_json)


@app.command("verify")
def verify(as_json: AsJson = False) -> None:
    """Compare each library with the hash that was written beside it; exit with 1 if one differs."""
    found = entries()
    spoiled = [entry for entry in found if not entry.sound]
    text = f"{len(found) - len(spoiled)} of {len(found)} entries are sound"
    if spoiled:
        text += "; they are compiled again when they are needed: " + ", ".join(entry.name for entry in spoiled)
    data = {"entries": len(found), "spoiled": [entry.name for entry in spoiled]}
    show(Text(text, style="yellow" if spoiled else "green"), data, as_json)
    if spoiled:
        raise typer.Exit(1)


@app.command("clear")
def clear(as_json: AsJson = False) -> None:
    """Remove all entries; they are compiled again when they are needed."""
    found = entries()
    size = sum(entry.bytes for entry in found)
    for entry in found:
        entry.remove()
    text = Text(f"removed {len(found)} entries, {size / 1e6:.1f} MB")
    show(text, {"removed": len(found), "bytes": size}, as_json)


def _data(entry: build.Entry) -> dict[str, Any]:
    return {"name": entry.name, "title": entry.title, "bytes": entry.bytes, "sound": entry.sound}


def _table(found: list[build.Entry]) -> Table:
    table = Table(title=f"{len(found)} compiled kernels in {build.cache_directory()}", title_justify="left")
    for name in ("entry", "what", "KB", "sound"):
        table.add_column(name, overflow="fold", justify="right" if name == "KB" else "left")
    for entry in found:
        table.add_row(entry.name, entry.title, f"{entry.bytes / 1e3:.0f}", "yes" if entry.sound else "no")
    return table
