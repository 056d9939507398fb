"""How much memory `sparsify_` takes, while it works and afterwards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARGUMENTS = [{"method": "magnitude"}, {"permute": True}]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to tell the peak")
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda a: next(iter(a)))
def test_peak_is_one_stack_above_the_model(arguments: dict[str, object]) -> None:
    """And what is left is what was packed: 0.27 of the dense float32 weights."""
    command = [sys.executable, "-m", "tests.sparsity.peak", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["peak"] <= found["stack"] == 32
    assert 0.25 * found["dense"] <= found["left"] <= 0.30 * found["dense"]
