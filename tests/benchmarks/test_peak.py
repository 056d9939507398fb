"""A call of a block takes, above its inputs, at most its outputs and two activations for each slot."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.inductor
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to tell the peak")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", ["dense", "2:4", "1:2:32"])
def test_peak_of_a_call(pattern: str, dtype: str) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.peak", pattern, dtype]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if not found["kernel"].startswith("kernel"):
        pytest.skip(f"the block runs as {found['kernel']}")
    assert found["bound"] > 8
    assert found["above"] > found["bound"] / 4, "the peak was not seen"
    assert found["holds"], found
