"""The file of a kernel: what is loaded is the text, whatever the cache holds."""

import stat
from pathlib import Path

import pytest

from samoyeds_codegen.errors import CompilationError
from samoyeds_codegen.triton.build import load_text

TEXT = "def answer():\n    return 42\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMOYEDS_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


def test_file_has_the_text_and_nothing_else_is_left(cache):
    module = load_text("thing", TEXT)
    (path,) = cache.iterdir()
    assert module.answer() == 42 and path.read_text() == TEXT and module.__file__ == str(path)
    assert path.name.startswith("triton-thing-") and stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_tampered_file_is_written_again(cache):
    path = Path(load_text("thing", TEXT).__file__)
    path.write_text("def answer():\n    return 41\n")
    assert load_text("thing", TEXT).answer() == 42
    assert path.read_text() == TEXT


def test_other_text_is_another_file(cache):
    assert load_text("thing", TEXT).answer() == 42
    assert load_text("thing", TEXT.replace("42", "43")).answer() == 43
    assert len(list(cache.iterdir())) == 2


def test_what_is_no_module_is_named(cache):
    with pytest.raises(CompilationError, match=r"thing.*SyntaxError"):
        load_text("thing", "def answer(:\n")
    with pytest.raises(CompilationError, match="No module named 'nowhere_at_all'"):
        load_text("thing", "import nowhere_at_all\n")
