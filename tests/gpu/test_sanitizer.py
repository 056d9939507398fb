"""compute-sanitizer over the proofs of kernels, which are small: nothing out of bounds, no race, no misused barrier."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

from samoyeds_codegen.cuda.spec import VARIANTS
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
AVAILABLE = torch.cuda.is_available()
CAPABILITY = torch.cuda.get_device_capability() if AVAILABLE else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not AVAILABLE, reason="needs a CUDA device"),
    pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, of the CUDA toolkit"),
]
SWIGLU = "silu(gate) * up"
SPECS = {
    "1:1": ExpertsSpec("float16", Pattern(1, 1, 32), SWIGLU, True),
    "1:2": ExpertsSpec("bfloat16", Pattern(1, 2, 64), SWIGLU, True),
}
TRITON = """
import sys, torch
from samoyeds_codegen.triton.prove import prove
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec
sys.exit(prove(ExpertsSpec.named(sys.argv[1]), Form(aligned=False, bias=True), torch.device("cuda")))
"""


def sanitized(tool: str, *words: str) -> str:
    """Output of a process under a tool.

    Raises:
        AssertionError: the tool found something, or the process failed.
    """
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", sys.executable, *words]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that buffers are allocations
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, said[-4000:]
    return done.stdout


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
@pytest.mark.parametrize("kind", ["mma", *VARIANTS])
@pytest.mark.parametrize("pattern", SPECS)
def test_cuda_kernels(pattern, kind, tool) -> None:
    if kind != "mma" and CAPABILITY != (9, 0):
        pytest.skip("needs sm_90a")
    question = json.dumps({
        "spec": SPECS[pattern].name, "kind": kind, "form": asdict(Form(aligned=False, bias=True)), "device": "cuda:0",
        "capability": CAPABILITY,
    })  # fmt: skip
    said = sanitized(tool, "-m", "samoyeds_codegen.gpu.answer", question)
    answers = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert answers == [{"reason": ""}], said


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("pattern", SPECS)
def test_triton_kernels(pattern, tool) -> None:
    sanitized(tool, "-c", TRITON, SPECS[pattern].name)
