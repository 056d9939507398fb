"""``samoyeds cache`` and ``samoyeds doctor``."""

import json
from pathlib import Path

import pytest

from samoyeds_codegen import build
from samoyeds_codegen.cpp import ops
from tests.cli.run import run

TEXT = '// A number. Generated, do not edit.\nextern "C" int number() { return %d; }\n'


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two entries."""
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


def test_doctor() -> None:
    done = run("doctor", "--json")
    assert done.exit_code == 0, done.stdout
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert {"torch", "compiler", "ops in C++", "cache", "kernels, bfloat16"} <= checks.keys()
    assert checks["torch"]["state"] == "ok" and "is used" in checks["kernels, float32"]["found"]
    assert "samoyeds doctor" in run("doctor").stdout


def test_doctor_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    ops.ops_library.cache_clear()
    done = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.exit_code == 1 and checks["compiler"]["state"] == "bad"
    assert "no-such-compiler" in checks["compiler"]["found"] and checks["compiler"]["remedy"]


def test_doctor_sees_a_spoiled_cache(cache: Path) -> None:
    (min(cache.iterdir()) / "kernel.so").unlink()
    done = run("doctor", "--json")
    (check,) = [check for check in json.loads(done.stdout) if check["name"] == "cache"]
    assert done.exit_code == 1 and check["state"] == "bad"
    assert "1 spoiled" in check["found"] and "samoyeds cache clear" in check["remedy"]
