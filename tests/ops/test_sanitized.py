"""Every variant of the kernels under AddressSanitizer and UndefinedBehaviorSanitizer, over the same cases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from samoyeds_codegen.build import find_compiler

CASES = ("test_sparse_experts.py", "test_dense_experts.py", "test_cpu_products.py", "test_unpack.py")
FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"


def runtime() -> str:
    """The library of the sanitizer, which Python must load before anything else."""
    command = [find_compiler().command, "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("cases", CASES)
def test_under_sanitizers(cases: str) -> None:
    if not Path(runtime()).exists():
        pytest.skip("the compiler has no AddressSanitizer")
    environment = {
        **os.environ,
        "SAMOYEDS_TEST_FLAGS": FLAGS,
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    path, chosen = Path(__file__).with_name(cases), "ragged or strips or threads or damaged or layouts or slices"
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(path), "-k", chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
