"""A call of a block takes, above its inputs, at most its outputs and two activations for each slot."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


PATTERNS = ("dense", "2:4", "1:2:32")


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def peaks(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.benchmarks.peak", request.param, *PATTERNS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.inductor
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to tell the peak")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_peak_of_a_call(pattern: str, peaks: dict[str, dict[str, Any]]) -> None:
    found = peaks[pattern]
    if not found["kernel"].startswith("kernel"):
        pytest.skip(f"the block runs as {found['kernel']}")
    assert found["bound"] > 8
    assert found["above"] > found["bound"] / 4, "the peak was not seen"
    assert found["holds"], found
