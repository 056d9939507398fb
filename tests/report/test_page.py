"""``report.html`` in a browser, and the data behind it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from samoyeds_compile import SparsityConfig
from samoyeds_compile.report.dump import write_reports
from samoyeds_compile.report.html import write_page
from samoyeds_compile.sparsity.solver import best_mask
from samoyeds_compile.sparsity.tensor import PackedTensor
from tests.blocks import Block
from tests.report import browser


class Model(nn.Module):
    """Two blocks, one of which stays as it is."""

    def __init__(self):
        super().__init__()
        self.first = Block(hidden=32, width=32)
        self.second = Block(hidden=32, width=32, activate=lambda z: z.chunk(2, -1)[0].cumsum(0))

    def forward(self, x):
        return self.first(x) + self.second(x)


def sparse_model():
    """The model with the weights of its first block packed."""
    torch.manual_seed(0)
    model, config = Model().eval(), SparsityConfig()
    for name in ("gate_up", "down"):
        weight = getattr(model.first, name).detach()
        packed = PackedTensor.from_dense(weight * best_mask(weight.abs(), config), config)
        setattr(model.first, name, nn.Parameter(packed, requires_grad=False))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The dump of a model with packed weights."""
    torch._dynamo.reset()
    model, path = sparse_model(), tmp_path_factory.mktemp("page") / "dumped"
    with torch.no_grad():
        torch.compile(model, backend="samoyeds", options={"base": "eager", "dump": path})(torch.randn(6, 32))
    (path / "graph_000" / "blocks" / "0" / "layout.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><rect width="9" height="9"/></svg>'
    )
    write_reports(path)
    return path


def test_view(folder):
    """What the page shows of a block: its lines, the operations before and after, the kernel, the weights."""
    view = json.loads((folder / "graph_000" / "view.json").read_text())
    first, second = view["blocks"]
    assert [o["op"] for o in first["after"]["operations"]] == ["samoyeds.experts_packed"]
    assert {"sort", "histc"} <= {o["op"] for o in first["before"]["operations"]}
    passages = [view["passages"][i] for i in first["passages"]]
    hits = [passage["text"][line - passage["first"]] for passage in passages for line in passage["hits"]]
    assert any("torch.sort" in text for text in hits)
    assert first["kernel"]["title"].startswith("kernel of packed experts")
    assert [name[-4:] for name in first["kernel"]["files"]] == [".cpp", ".log"]
    boxes = view["picture"]["boxes"]
    assert [box["block"] for box in boxes if box["block"] is not None] == [0, 1]
    assert all(a < b for a, b, _ in view["picture"]["edges"]), "edges go with the order in which boxes run"
    assert second["after"] is None and second["reason_at"][0].endswith("test_page.py")


def test_pattern_is_that_of_the_weight(folder):
    """The picture of a packed weight has the zeros of its corner, and nothing else."""
    view = json.loads((folder / "graph_000" / "view.json").read_text())
    patterns = view["blocks"][0]["patterns"]
    assert [p["name"].rpartition(".")[2] for p in patterns] == ["gate_up", "down"]
    corner = sparse_model().first.gate_up.to_dense()[0, :32, :64]
    drawn = torch.tensor([[level != "." for level in row] for row in patterns[0]["rows"]])
    assert torch.equal(drawn, corner != 0) and drawn.float().mean() == 0.25


@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_page_in_a_browser(folder, tmp_path):
    with browser.opened(folder / "report.html", tmp_path / "profile") as page:
        assert "1 of 2 blocks rewritten" in page.evaluate("document.getElementById('summary').textContent")
        assert "cumsum is not known" in page.evaluate("document.getElementById('detail').textContent")
        page.click("#picture .box[data-block='0']")
        detail = "document.getElementById('detail').textContent"
        assert all(text in page.evaluate(detail) for text in ("samoyeds.experts_packed", "torch.sort", "swiglu"))
        names = page.evaluate("[...document.querySelectorAll('[data-tab]')].map(tab => tab.dataset.tab)")
        assert names == ["lines", "graph", "kernel", "pattern", "cost", "files", "all"]
        page.press("2")
        assert page.evaluate("document.querySelectorAll('.graphview .box.ours').length") == 1
        page.press("3")
        assert page.evaluate("document.querySelectorAll('pre.kernel .l').length") > 100
        assert page.evaluate("document.querySelectorAll('pre.kernel .sp').length") > 0
        page.press("4")
        assert page.evaluate("document.querySelectorAll('canvas').length") == 2
        page.press("6")
        assert page.evaluate("document.querySelector('#tab img').naturalWidth") > 0
        theme = page.evaluate("document.documentElement.dataset.theme")
        page.press("t")
        assert page.evaluate("document.documentElement.dataset.theme") != theme
        page.press("j")
        assert "cumsum(0)" in page.evaluate("document.querySelector('.l.at').textContent")
        page.press("Escape")
        assert page.evaluate("document.querySelector('[aria-current]')") is None
        assert page.errors == [] and page.requested == []


def test_text_of_a_model_is_no_markup(tmp_path):
    """What comes from the user's code cannot end the page's script."""
    block = {"module": "</script><script>alert(1)</script>", "rewritten": False, "reason": "<b>"}
    write_page(tmp_path, {"version": 1, "graphs": [], "uncaptured": [block]})
    text = (tmp_path / "report.html").read_text()
    assert "alert(1)" in text and "</script><script>alert" not in text
