"""kill -9 in the middle of a step: the next process goes on as if it had not been, masks and packed weights kept."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from samoyeds_compile.sparsity import PackedTensor
from tests.integrations.killed import MASKED, prepared, train

ROOT = Path(__file__).parents[2]
STEPS, KILLED_AT = 5, 3


def test_resumes_after_a_kill(tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-m", "tests.integrations.killed", str(tmp_path / "killed"), str(STEPS), str(KILLED_AT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=False)
    assert saved[2]["steps"] == KILLED_AT
    assert isinstance(saved[0]["blocks.1.down"], PackedTensor)

    resumed, whole = train(tmp_path / "killed", STEPS), train(tmp_path / "whole", STEPS)
    assert resumed.keys() == whole.keys() == prepared().state_dict().keys()
    for name, expected in whole.items():
        found = resumed[name]
        if isinstance(expected, PackedTensor):
            assert isinstance(found, PackedTensor) and torch.equal(found.metadata, expected.metadata)
            found, expected = found.to_dense(), expected.to_dense()
        assert torch.equal(found, expected), name

    start = prepared().state_dict()
    for name in MASKED:
        moved = resumed[f"{name}_mask"] != start[f"{name}_mask"]
        assert (
            resumed[f"{name}_mask"].dtype == torch.bool and moved.any()
        )  # masks that nothing changed would show nothing
