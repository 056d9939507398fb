"""``repro --time``: what it writes, and the cost model beside it on the page."""

import json

import jsonschema
import pytest
import torch
from torch import nn

from samoyeds_compile import repro
from samoyeds_compile.layout.plan import expected
from samoyeds_compile.layout.regimes import regimes
from samoyeds_compile.report.schema import report_schema
from tests.blocks import Block
from tests.layout.test_assign import CONSTANTS, SIZES
from tests.report import browser

DETAIL = "document.getElementById('tab').textContent"


@pytest.fixture
def folder(tmp_path):
    """Two blocks that are alike: one program."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    path, model = tmp_path / "dumped", nn.Sequential(Block(), Block())
    with torch.no_grad():
        torch.compile(model, backend="samoyeds", options={"base": "eager", "dump": path})(torch.randn(6, 16))
    return path


def measured_of(folder):
    assert repro.main([str(folder), "0/0", "--seeds", "1", "--time", "--base", "eager"]) == 0
    return json.loads((folder / "graph_000" / "blocks" / "0" / "measured.json").read_text())


def layouts_of(folder):
    return json.loads((folder / "report.json").read_text())["graphs"][0]["layouts"]


def test_prediction_is_of_the_recorded_tokens(folder):
    for layout in layouts_of(folder):
        assert layout["tokens"] == 6 and layout["microseconds"] > 0
    jsonschema.validate(json.loads((folder / "report.json").read_text()), report_schema())


def test_prediction_is_the_sum_over_edges():
    """With as many tokens as a regime was assigned for."""
    for regime in regimes(SIZES, CONSTANTS):
        edges = sum(edge.picoseconds for edge in regime.assignment.edges) / 1e6
        assert expected(SIZES.at(regime.tokens), CONSTANTS) == pytest.approx(edges, rel=1e-3)


def test_file_is_written(folder, capsys):
    """And the report of the model as a whole stays."""
    whole = json.loads((folder / "report.json").read_text()) | {"uncaptured": [], "breaks": [], "notes": ["kept"]}
    (folder / "report.json").write_text(json.dumps(whole))
    measured = measured_of(folder)
    assert set(measured["milliseconds"]) == {"before", "after"} and min(measured["milliseconds"].values()) > 0
    assert measured["threads"] == torch.get_num_threads() and measured["base"] == "eager" and measured["machine"]
    assert "float32 [6, 16]" in measured["inputs"]
    assert "ms before" in capsys.readouterr().out
    assert json.loads((folder / "report.json").read_text())["notes"] == ["kept"]


@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_page_shows_both(folder, tmp_path):
    def shown(block, *names):
        with browser.opened(folder / "report.html", tmp_path / "profile") as page:
            for _ in range(block + 1):
                page.press("j")
            page.click("[data-tab='cost']")
            found = [page.evaluate(f"document.getElementById('cost-{name}').textContent") for name in names]
            assert page.errors == []
            return page.evaluate(DETAIL), found

    text, (predicted, measured) = shown(1, "predicted", "measured")
    assert "repro dumped 000/0 --time" in text and measured == "not measured"
    (microseconds,) = {layout["microseconds"] for layout in layouts_of(folder)}
    assert predicted == f"{microseconds:.1f} µs"

    times = measured_of(folder)["milliseconds"]
    for block in (0, 1):
        text, found = shown(block, "predicted", "measured", "original", "ratio", "gain")
        assert "not measured" not in text.lower() and ("which is alike" in text) == (block == 1)
        values = [microseconds, 1e3 * times["after"], 1e3 * times["before"]]
        assert found[:3] == [f"{value:.1f} µs" for value in values]
        ratios = [values[1] / microseconds, times["before"] / times["after"]]
        assert [float(text.split()[0]) for text in found[3:]] == pytest.approx(ratios, abs=0.0051)
