"""``samoyeds cache`` and ``samoyeds doctor``."""

import json
from pathlib import Path

import pytest
import torch

from samoyeds_codegen import build
from samoyeds_codegen.cpp import ops
from samoyeds_codegen.errors import CompilationError
from samoyeds_codegen.gpu import results
from samoyeds_codegen.gpu.apart import proven_apart
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.triton.build import load_text
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern
from tests.cli.run import run

TEXT = '// A number. Generated, do not edit.\nextern "C" int number() { return %d; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two entries."""
    ops.ops_library()  # a process loads it once, and not from here
    monkeypatch.setenv(build.DIRECTORY_VARIABLE, str(tmp_path))
    build.load_all([build.Source("number", TEXT % i) for i in range(2)])
    return tmp_path / "kernels"


def test_ls(cache: Path) -> None:
    found = json.loads(run("cache", "ls", "--json").stdout)
    assert [entry["title"] for entry in found] == ["A number."] * 2 and all(entry["sound"] for entry in found)
    assert {entry["name"] for entry in found} == {path.name for path in cache.iterdir()}
    assert "2 compiled kernels" in run("cache", "ls").stdout


def test_verify(cache: Path) -> None:
    assert run("cache", "verify").exit_code == 0
    spoiled = min(cache.iterdir())
    (spoiled / "kernel.so").write_bytes(b"something else")
    done = run("cache", "verify", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout) == {"entries": 2, "spoiled": [spoiled.name]}


def test_clear(cache: Path) -> None:
    (cache / "making-another").mkdir()
    done = run("cache", "clear", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["removed"] == 2
    assert [path.name for path in cache.iterdir()] == ["making-another"], "another process is at it"


def test_folder_that_others_may_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.DIRECTORY_VARIABLE, str(tmp_path))
    (tmp_path / "kernels").mkdir(mode=0o777)
    (tmp_path / "kernels").chmod(0o777)
    done = run("cache", "ls")
    assert done.exit_code == 2 and "may be written by others" in done.stderr


def test_cubins_and_triton_texts(cache: Path) -> None:
    """They lie there too, with other results."""
    build.cached("cuda-sm_90-0", "kernel.cubin", lambda folder: (folder / "kernel.cubin").write_bytes(b"cubin"))
    load_text("up", '"""Samoyeds numbers.\n\nGenerated, do not edit.\n"""\nNUMBER = 3\n')
    found = {entry["name"].rpartition("-")[0]: entry for entry in json.loads(run("cache", "ls", "--json").stdout)}
    assert {name: entry["sound"] for name, entry in found.items()} == dict.fromkeys(
        ("number", "cuda-sm_90", "triton-up"), True
    )
    assert found["triton-up"]["title"] == "Samoyeds numbers."
    (cache / found["triton-up"]["name"]).write_text("NUMBER = 4\n")
    assert run("cache", "verify").exit_code == 1
    assert json.loads(run("cache", "clear", "--json").stdout)["removed"] == 4 and not list(cache.iterdir())


def test_what_is_known_of_devices_is_no_kernel(cache: Path) -> None:
    """Times and proofs are kept, but nothing vouches for them: not entries that are spoiled, nor removed with them."""
    device = Device("A100", (8, 0), 108, 1.41e9, 2.0e12)
    spec = ExpertsSpec("bfloat16", Pattern(1, 2, 64), "silu(gate) * up", True)
    results.keep(device, {"block": {"candidate": 1.0}})
    proven_apart(spec, "mma", Form(), torch.device("cpu"), device, lambda question: '{"reason": "wrong"}')
    assert len(json.loads(run("cache", "ls", "--json").stdout)) == 2 and run("cache", "verify").exit_code == 0
    assert run("doctor").exit_code == 0
    run("cache", "clear")
    assert results.stored(device) == {"block": {"candidate": 1.0}}
    assert proven_apart(spec, "mma", Form(), torch.device("cpu"), device, lambda question: "") == "wrong"


def test_doctor(cache: Path) -> None:
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert {"torch", "compiler", "ops in C++", "cache", "kernels, bfloat16"} <= checks.keys()
    assert checks["torch"]["state"] == "ok" and "is used" in checks["kernels, float32"]["found"]
    assert "samoyeds doctor" in run("doctor").stdout


def test_doctor_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise CompilationError("g++ kernel.cpp:\nno such header")

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(ops, "ops_library", fails)
    done = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.exit_code == 1 and checks["compiler"]["state"] == checks["ops in C++"]["state"] == "bad"
    assert "no-such-compiler" in checks["compiler"]["found"] and checks["compiler"]["remedy"]
    assert checks["ops in C++"]["found"] == "g++ kernel.cpp:" and checks["cache"]["state"] == "ok"


def test_doctor_sees_a_spoiled_cache(cache: Path) -> None:
    (min(cache.iterdir()) / "kernel.so").unlink()
    done = run("doctor", "--json")
    (check,) = [check for check in json.loads(done.stdout) if check["name"] == "cache"]
    assert done.exit_code == 1 and check["state"] == "bad"
    assert "1 spoiled" in check["found"] and "samoyeds cache clear" in check["remedy"]
