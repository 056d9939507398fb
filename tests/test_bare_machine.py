"""tests/gpu needs torch, Triton and pytest, and no other package that is not torch's or this project's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKED = """
import importlib.abc, sys
import pytest

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"{name} is not on a bare machine", name=name)

sys.meta_path.insert(0, Blocked())
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[2:]]))
"""
ABSENT = ("hypothesis", "transformers", "accelerate", "peft", "safetensors", "rich", "typer", "matplotlib", "nbformat")
"""Packages that tests, integrations and the command line use elsewhere."""


def bare(*words: str) -> subprocess.CompletedProcess[str]:
    # Plugins of the packages that are blocked would be imported by pytest itself.
    command = [sys.executable, "-c", BLOCKED, ",".join(ABSENT), "-p", "no:hypothesispytest", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_gpu_tests_are_collected() -> None:
    pytest.importorskip("triton", reason="Triton is not made for this machine")
    done = bare("--collect-only", "tests/gpu")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    found = set(re.findall(r"^tests/gpu/(test_\w+)\.py", done.stdout, flags=re.MULTILINE))
    assert found == {path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py")}


def test_blocking_blocks() -> None:
    done = bare("--collect-only", "tests/ops/test_router.py")
    assert done.returncode != 0 and "is not on a bare machine" in done.stdout


@pytest.mark.parametrize(
    ("file", "name"), [("interpreted_training", "half and bfloat16"), ("interpreted_op", "compiled_training_step")]
)
def test_kernels_and_compiled_blocks_run(monkeypatch: pytest.MonkeyPatch, file: str, name: str) -> None:
    """Not only imports: in Triton's interpreter, as there is no GPU here."""
    pytest.importorskip("triton", reason="Triton is not made for this machine")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = bare(f"tests/codegen/triton/{file}.py", "-k", name)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
