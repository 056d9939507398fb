"""The published schema of reports."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from samoyeds_compile import Report
from samoyeds_compile.cli import main
from samoyeds_compile.report.schema import report_schema
from tests.cli.run import run


def test_printed() -> None:
    done = run("schema")
    schema = json.loads(done.stdout)
    assert done.exit_code == 0 and schema == report_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    blocks = schema["$defs"]["BlockReport"]["properties"]
    assert all(entry.get("description") for entry in blocks.values()), "every field of a block is explained"


def test_report_json_of_a_dump_folder(tmp_path: Path) -> None:
    report = Report()
    compiled = torch.compile(
        nn.Linear(4, 4), backend="samoyeds", options={"dump": tmp_path, "base": "eager", "report": report}
    )
    compiled(torch.ones(2, 4))
    jsonschema.validate(json.loads((tmp_path / "report.json").read_text()), report_schema())
    jsonschema.validate(json.loads(report.to_json()), report_schema())


@pytest.mark.parametrize("spoil", [{"version": 99}, {"graphs": [{"name": 3}]}, {"more": 1}])
def test_other_reports_are_refused(spoil: dict) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(Report().to_dict() | spoil, report_schema())


def test_console_script() -> None:
    """It is installed, and runs in a process of its own."""
    (script,) = metadata.entry_points(group="console_scripts", name="samoyeds")
    assert script.load() is main
    command = [sys.executable, "-c", "from samoyeds_compile.cli import main; main()", "explain", "no/such-model"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "samoyeds: no/such-model is no configuration" in done.stderr
