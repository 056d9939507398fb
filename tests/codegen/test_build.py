"""The cache of compiled kernels: compiled once, private, and never loaded unverified."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from samoyeds_codegen import build
from samoyeds_codegen.build import Source, load, load_all
from samoyeds_codegen.errors import CacheError, CompilationError, CompilerNotFoundError

ANSWER = 'extern "C" int answer() {{ return {}; }}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CXX", build.find_compiler().command)  # other processes need not ask Inductor for it
    monkeypatch.setenv(build.DIRECTORY_VARIABLE, str(tmp_path))
    return tmp_path / "kernels"


def answer(number: int) -> Source:
    return Source("answer", ANSWER.format(number))


def answer_in_new_process(number: int, **environment: str) -> str:
    program = f"from samoyeds_codegen.build import *; print(load(Source('answer', {ANSWER.format(number)!r})).answer())"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def only_entry(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def test_compiled_loaded_and_private(cache: Path) -> None:
    assert load(answer(41)).answer() == 41
    entry = only_entry(cache)
    assert {p.name for p in entry.iterdir()} == {"kernel.cpp", "kernel.so", "kernel.sha256", "kernel.log"}
    assert (entry / "kernel.cpp").read_text() == answer(41).text
    assert [stat.S_IMODE(p.stat().st_mode) for p in (cache, entry)] == [0o700, 0o700]


def test_log_says_how_it_was_compiled(cache: Path) -> None:
    source = Source("answer", '#warning "look here"\n' + answer(40).text, ("-DUNUSED=1",))
    compiler, command, seconds, *said = build.compile_log(load(source)).splitlines()
    assert compiler == build.find_compiler().version.splitlines()[0]
    assert "kernel.cpp -std=c++17" in command and "-DUNUSED=1 -o kernel.so" in command
    assert str(cache) not in command
    assert seconds.endswith(" s") and "look here" in "\n".join(said)


def test_compiler_of_several_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {build.find_compiler().command}")
    assert load(answer(43)).answer() == 43


def test_second_process_compiles_nothing(cache: Path, tmp_path: Path) -> None:
    """It finds a compiler that tells its version and fails at everything else."""
    real = build.find_compiler().command
    fake = tmp_path / "fake-cxx"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = --version ] || [ -z "$REFUSE" ]; then exec {real} "$@"; fi\nexit 1\n')
    fake.chmod(0o700)
    assert answer_in_new_process(42, CXX=str(fake)) == "42"
    assert answer_in_new_process(42, CXX=str(fake), REFUSE="1") == "42"
    with pytest.MonkeyPatch.context() as patch:  # the fake does refuse
        patch.setenv("CXX", str(fake))
        patch.setenv("REFUSE", "1")
        with pytest.raises(CompilationError, match="fake-cxx"):
            load(answer(43))


@pytest.mark.parametrize("spoiled", ["kernel.so", "kernel.sha256"])
def test_spoiled_entries_are_compiled_again(cache: Path, spoiled: str) -> None:
    """In another process, as a loaded library stays what it is."""
    load(answer(44))
    entry = only_entry(cache)
    replacement = b"" if spoiled == "kernel.so" else b"0" * 64
    (entry / spoiled).unlink()
    (entry / spoiled).write_bytes(replacement)
    assert answer_in_new_process(44) == "44"
    assert (only_entry(cache) / spoiled).read_bytes() != replacement


def test_another_library_in_place_of_ours_is_not_loaded(cache: Path) -> None:
    load_all([answer(45), answer(46)])
    first, second = (e for n in (45, 46) for e in cache.iterdir() if f"return {n};" in (e / "kernel.cpp").read_text())
    (first / "kernel.so").unlink()
    (first / "kernel.so").write_bytes((second / "kernel.so").read_bytes())
    assert not build._is_sound(first)
    assert answer_in_new_process(45) == "45"


def test_text_flags_and_compiler_are_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = build.find_compiler()
    others = [
        build._key(answer(2), compiler),
        build._key(Source("answer", answer(1).text, ("-g",)), compiler),
        build._key(answer(1), build.Compiler(compiler.command, "another version")),
    ]
    assert build._key(answer(1), compiler) not in others and len(set(others)) == 3


def test_many_at_once(cache: Path) -> None:
    """The same one twice too: whoever is second takes what the first made."""
    libraries = load_all([answer(n) for n in (50, 51, 51, 50)])
    assert [library.answer() for library in libraries] == [50, 51, 51, 50]
    assert len(list(cache.iterdir())) == 2


def test_errors(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with pytest.raises(CompilationError, match="does not compile"):
        load(Source("wrong", "this does not compile;"))
    assert not list(cache.iterdir())  # nothing half done stays
    cache.chmod(0o777)
    with pytest.raises(CacheError, match="others"):
        load(answer(1))
    monkeypatch.setenv(build.DIRECTORY_VARIABLE, "/proc/none")
    with pytest.raises(CacheError, match="cannot be made"):
        load(answer(1))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompilerNotFoundError, match="no-such-compiler"):
        load(answer(1))
