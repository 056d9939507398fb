"""The command line in this process."""

from click.testing import Result
from typer.testing import CliRunner

from samoyeds_compile.cli.app import app


def run(*arguments: object) -> Result:
    """Arguments as on the command line; ``exit_code``, ``stdout`` and ``stderr`` are in the result."""
    return CliRunner().invoke(app, [str(a) for a in arguments])
