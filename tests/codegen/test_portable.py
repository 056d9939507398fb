"""Portable kernels as programs of their own, on this machine and, where tools are there, on ARM64 under an emulator.

Debian has the tools in g++-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from samoyeds_codegen.build import FLAGS, find_compiler
from samoyeds_codegen.cpp.emit import emit
from samoyeds_codegen.cpp.isa import PORTABLE
from samoyeds_codegen.cpp.ops import emit_ops
from samoyeds_codegen.cpp.spec import ExpertsSpec

DRIVER = Path(__file__).with_name("portable_driver.cpp").read_text()
ARM = ("aarch64-linux-gnu-g++", "qemu-aarch64")
NEEDS_ARM = pytest.mark.skipif(not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)}")
SPECS = [
    ExpertsSpec("float32", 1, 2, 32, 1, "gate * up", True),
    ExpertsSpec("float32", 1, 1, 16, 1, "gate * up", True),
    ExpertsSpec("bfloat16", 1, 2, 128, 16, "gate * up", True),
    ExpertsSpec("bfloat16", 2, 4, 64, 2, "gate * up", True),
    ExpertsSpec("float32", 1, 2, 32, 1, "gate * up", True, strips=True),
    ExpertsSpec("bfloat16", 2, 4, 16, 1, "gate * up", True, strips=True),
    ExpertsSpec("bfloat16", 1, 2, 64, 16, "gate * up", True, strips=True),
]
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
"""Results are float32 either way; in bfloat16 h is not rounded by this variant."""


def error_of(spec: ExpertsSpec, folder: Path, compiler: list[str], runner: list[str]) -> float:
    """Relative error that the program finds."""
    text, program = folder / "kernel.cpp", folder / "kernel"
    text.write_text(f"{emit(spec, PORTABLE)}constexpr bool IN_STRIPS = {str(spec.strips).lower()};\n{DRIVER}")
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    subprocess.run([*compiler, str(text), *flags, "-O2", "-o", str(program)], check=True)
    return float(subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_here(spec: ExpertsSpec, tmp_path: Path) -> None:
    assert error_of(spec, tmp_path, find_compiler().words, []) <= TOLERANCE[spec.dtype]


@NEEDS_ARM
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_on_arm(spec: ExpertsSpec, tmp_path: Path) -> None:
    assert error_of(spec, tmp_path, [ARM[0], "-static"], [ARM[1]]) <= TOLERANCE[spec.dtype]


@NEEDS_ARM
def test_ops_compile_for_arm(tmp_path: Path) -> None:
    """Against the headers of torch, which are the same on every machine."""
    text = tmp_path / "ops.cpp"
    text.write_text(emit_ops())
    include = Path(torch.__file__).parent / "include"
    flags = [f"-I{include}", '-DSAMOYEDS_TORCH="any"', "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    assert subprocess.run([ARM[0], str(text), *FLAGS, *flags, "-c", "-o", str(tmp_path / "ops.o")]).returncode == 0
