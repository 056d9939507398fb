"""``samoyeds schema``: the JSON schema of reports."""

from __future__ import annotations

import json
import sys


def schema() -> None:
    """Print the JSON schema of `Report.to_json()`, of `samoyeds explain --json` and of report.json in a dump folder."""
    from samoyeds_compile.report.schema import report_schema

    sys.stdout.write(json.dumps(report_schema(), indent=2) + "\n")
