"""docs/coverage.md is complete, and the way in which tests write it keeps what did not run."""

import pytest

from samoyeds_compile import Report
from samoyeds_compile.report.model import BlockReport, GraphReport
from tests.coverage_page import GROUPS, PAGE, cell, differences, merged, parse, render, summary, versions

pytest_plugins = ["pytester"]
CELLS = {
    ("P1", "titan_for_loop", "eval"): "1 of 1",
    ("P1", "titan_for_loop", "train"): "0 of 1: a | b",
    ("others", "doge", "eval"): "no block found",
}


def test_nothing_is_missing():
    """Every family and every style has its row, and every cell its text."""
    text = PAGE.read_text(encoding="utf-8")
    if f"Made with {versions()}." not in text:
        pytest.skip("the page was made with other versions of torch and transformers")
    wanted = {(key, row, column) for key, group in GROUPS.items() for row in group.rows() for column in group.columns}
    assert set(parse(text)) == wanted
    assert text == render(parse(text), versions())


def test_text_and_cells():
    assert parse(render(CELLS, "torch 1")) == CELLS
    assert "Made with torch 1." in render(CELLS, "torch 1")


def test_only_what_ran_counts():
    ran = {("P1", "titan_for_loop", "eval"): "0 of 1: why"}
    assert differences({}, CELLS) == [] and differences(CELLS, CELLS) == []
    (line,) = differences(ran, CELLS)
    assert "titan_for_loop" in line and "'1 of 1'" in line and "'0 of 1: why'" in line
    assert merged(ran, CELLS) == CELLS | ran
    stale = {("P1", "a style that is gone", "eval"): "1 of 1"}
    assert merged(ran, CELLS | stale) == CELLS | ran


def test_summary():
    blocks = [BlockReport("a", "", "", rewritten) for rewritten in (True, False, False)]
    blocks[1].reason = blocks[2].reason = "why"
    assert summary(Report()) == "no block found"
    assert summary(Report([GraphReport("", blocks=blocks)])) == "1 of 3: why"
    assert cell("P1", "x", "eval", Report([GraphReport("", blocks=blocks[:1])]))[1] == ("P1", "x", "eval", "1 of 1")


CONFTEST = """
import sys
from pathlib import Path

sys.path.insert(0, {root!r})
from tests.coverage_page import CoveragePage


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(CoveragePage(Path({page!r})))
"""
TESTS = """
import pytest


@pytest.mark.parametrize("column", ["eval", "train"])
def test_same_and_new(record_property, column):
    record_property("coverage", ("P1", "titan_for_loop", column, "1 of 1"))


def test_failing(record_property, request):
    record_property("coverage", ("others", "doge", "eval", "2 of 2"))
    pytest.xfail("a test that does not pass")
"""


@pytest.mark.parametrize("workers", [(), ("-n", "2", "--dist", "worksteal")], ids=["one process", "workers"])
@pytest.mark.parametrize("accept", [False, True], ids=["compare", "accept"])
def test_session(pytester, monkeypatch, workers, accept):
    """A difference fails a run of passing tests, or is written; what did not pass counts for nothing."""
    page = pytester.path / "coverage.md"
    page.write_text(render(CELLS, versions()), encoding="utf-8")
    monkeypatch.setenv("SAMOYEDS_ACCEPT", "1" if accept else "")
    pytester.makeconftest(CONFTEST.format(root=str(PAGE.parents[1]), page=str(page)))
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess(*workers)
    assert result.ret == (pytest.ExitCode.OK if accept else pytest.ExitCode.TESTS_FAILED)
    assert accept or "the test saw '1 of 1'" in result.stdout.str()
    changed = {("P1", "titan_for_loop", "train"): "1 of 1"} if accept else {}
    assert parse(page.read_text(encoding="utf-8")) == CELLS | changed
