"""Compiling without a GPU: once, verified on load, and with errors that help."""

import builtins
import sys

import pytest

from samoyeds_codegen import build
from samoyeds_codegen.cuda import nvrtc
from samoyeds_codegen.errors import CompilationError, CompilerNotFoundError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is NVRTC for Linux")
TEXT = 'extern "C" __global__ void samoyeds_kernel(int* x) { *x = %d; }'


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(build.DIRECTORY_VARIABLE, str(tmp_path))
    return tmp_path / "kernels"


def test_compiled_once(cache, monkeypatch) -> None:
    first = nvrtc.compile_cubin(TEXT % 1, "sm_80")
    assert first.read_bytes()[:4] == b"\x7fELF" and first.with_name("kernel.cu").read_text() == TEXT % 1
    version, command, *_, said = nvrtc.compile_log(TEXT % 1, "sm_80").splitlines()
    assert version.startswith("NVRTC ") and command.startswith("nvrtc --gpu-architecture=sm_80 ") and said
    assert nvrtc.compile_log(TEXT % 2, "sm_80") == ""
    monkeypatch.setattr(nvrtc, "_compile", None)
    assert nvrtc.compile_cubin(TEXT % 1, "sm_80") == first


def test_text_target_and_version_are_the_key(monkeypatch) -> None:
    found = {nvrtc.compile_cubin(TEXT % n, target) for n, target in ((1, "sm_80"), (2, "sm_80"), (1, "sm_90a"))}
    monkeypatch.setattr(nvrtc, "version", lambda: "0.0")
    found.add(nvrtc.compile_cubin(TEXT % 1, "sm_80"))
    assert len(found) == 4


def test_another_cubin_in_place_of_ours_is_not_used() -> None:
    first, second = (nvrtc.compile_cubin(TEXT % n, "sm_80") for n in (1, 2))
    good = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert nvrtc.compile_cubin(TEXT % 1, "sm_80").read_bytes() == good


def test_what_nvrtc_refuses() -> None:
    with pytest.raises(CompilationError, match=r"sm_80:\n.*identifier \"nonsense\" is undefined"):
        nvrtc.compile_cubin("__device__ int f() { return nonsense; }", "sm_80")


def test_missing_package(monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("cuda"):
            raise ImportError("No module named 'cuda'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CompilerNotFoundError, match=r"pip install \"samoyeds-compile\[cuda-compile\]\""):
        nvrtc.compile_cubin(TEXT % 1, "sm_80")
