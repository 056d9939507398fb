"""Option ``record_routing``: counts of slots by expert, equal to those of the ids, and results stay as they are."""

import json

import jsonschema
import pytest
import torch
from torch import nn

from samoyeds_compile import Report
from samoyeds_compile.errors import OperandError
from samoyeds_compile.report.schema import report_schema
from tests.blocks import Block
from tests.report import browser
from tests.report.test_dump import check_programs

BASES = ["eager", pytest.param("inductor", marks=pytest.mark.inductor)]
LENGTHS = (6, 9, 20)


def two_blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block("gathered", width=16, experts=5))


def compiled(model, base="eager", dynamic=True, **options):
    torch._dynamo.reset()
    report = Report()
    chosen = {"base": base, "report": report, "record_routing": True, **options}
    return torch.compile(model, backend="samoyeds", dynamic=dynamic, options=chosen), report


def counts_of(model, x):
    """By block and expert, from the ids that each router gives in eager mode."""
    found = []
    for block in model:
        ids = block.router(x).softmax(-1).topk(block.top_k, -1).indices
        found.append(torch.bincount(ids.reshape(-1), minlength=block.experts))
        x = block(x)
    return found


def slots_of(report):
    return [block.routing.slots for graph in report.graphs for block in graph.blocks]


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_counts_are_those_of_the_ids(base):
    model = two_blocks()
    function, report = compiled(model, base)
    expected = [torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)]
    for length in LENGTHS:
        x = torch.randn(length, 16)
        torch.testing.assert_close(function(x), model(x))
        expected = [a + b for a, b in zip(expected, counts_of(model, x), strict=True)]
        assert slots_of(report) == [counts.tolist() for counts in expected]
    assert len(report.graphs) == 1, "one graph for all numbers of tokens"
    busiest = report.blocks[0].routing.imbalance
    assert busiest == pytest.approx(float(expected[0].max() / expected[0].double().mean()))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_training(base, checkpointed):
    model, x = two_blocks(), torch.randn(7, 16)

    def forward(x):
        for block in model:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x

    parameters = list(model.parameters())
    expected = torch.autograd.grad(forward(x).square().sum(), parameters)
    function, report = compiled(forward, base)
    gradients = torch.autograd.grad(function(x).square().sum(), parameters)
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)
    times = 2 if checkpointed and base == "eager" else 1  # there the backward pass runs the whole body again
    assert slots_of(report) == [(times * counts).tolist() for counts in counts_of(model, x)]


@torch.no_grad()
def test_graphs_are_as_they_were_without_the_option(tmp_path):
    model, x = two_blocks(), torch.randn(6, 16)
    texts = {}
    for on in (False, True):
        function, report = compiled(model, record_routing=on, dump=tmp_path / str(on))
        texts[on, "result"] = function(x)
        texts[on] = (tmp_path / str(on) / "graph_000" / "after_lower.py").read_text()
    assert torch.equal(texts[False, "result"], texts[True, "result"])
    added = [line for line in texts[True].splitlines() if "samoyeds_slots" in line]
    assert sum("count_slots" in line for line in added) == 2 and "slots_0" not in texts[False]
    function, report = compiled(model, record_routing=False)
    function(x)
    assert [block.routing for block in report.blocks] == [None, None]
    assert "routing" not in [step.name for graph in report.graphs for step in graph.steps]


@torch.no_grad()
def test_counts_of_graphs_are_apart():
    """Two compilations of one model count for themselves."""
    model, x = two_blocks(), torch.randn(6, 16)
    function, first = compiled(model)
    function(x)
    other, second = compiled(model)
    other(x), other(x)
    assert slots_of(second) == [[2 * n for n in slots] for slots in slots_of(first)]


def test_opcheck_and_sentinels():
    counts, ids = torch.tensor([5, 0, 0]), torch.tensor([[0, -1], [3, 2], [2, 7]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.samoyeds.count_slots.default, (counts.clone(), ids))
    torch.ops.samoyeds.count_slots(counts, ids)
    assert counts.tolist() == [6, 0, 2]
    torch.ops.samoyeds.count_slots(counts, ids[:0])
    assert counts.tolist() == [6, 0, 2]


@pytest.mark.parametrize(
    "counts, ids", [(torch.zeros(3), torch.zeros(2, 2).long()), (torch.zeros(3).long(), torch.zeros(2))]
)
def test_bad_operands(counts, ids):
    with pytest.raises(OperandError, match=r"count_slots: (counts|expert_ids) is"):
        torch.ops.samoyeds.count_slots(counts, ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_captured_in_a_cuda_graph():
    """Which no operation can be that waits for the device."""
    counts, ids = torch.zeros(4, dtype=torch.int64, device="cuda"), torch.tensor([[0, 1], [1, 9]], device="cuda")
    torch.ops.samoyeds.count_slots(counts, ids)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.samoyeds.count_slots(counts, ids)
    before = counts.clone()
    graph.replay(), graph.replay()
    assert (counts - before).tolist() == [2, 4, 0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dump, the report, and both as they were before anything was counted."""
    path, model = tmp_path_factory.mktemp("routing") / "dumped", two_blocks()
    function, report = compiled(model, dump=path)
    with torch.no_grad():
        function(torch.randn(32, 16))
    return path, report, json.loads((path / "report.json").read_text())


def test_report_json(folder):
    path, report, before = folder
    report.update_dump()
    after = json.loads((path / "report.json").read_text())
    for data in (before, after, json.loads(report.to_json())):
        jsonschema.validate(data, report_schema())
    read = [[b["routing"]["slots"] for g in data["graphs"] for b in g["blocks"]] for data in (before, after)]
    assert read == [[[0] * 4, [0] * 5], slots_of(report)] and sum(read[1][0]) == 64
    assert f"64 slots over 4 experts, {max(read[1][0])} at expert" in str(report)


def test_programs_run(folder, capsys):
    check_programs(folder[0], capsys)
    assert "count_slots" in (folder[0] / "graph_000" / "after_routing.py").read_text()


@pytest.mark.skipif(browser.find() is None, reason="no Chromium is installed")
def test_page_has_a_chart(folder, tmp_path):
    path, report, _ = folder
    report.update_dump()
    with browser.opened(path / "report.html", tmp_path / "profile") as page:
        page.press("j")
        page.click("[data-tab='routing']")
        routing = report.blocks[0].routing
        heights = page.evaluate("[...document.querySelectorAll('svg.routing rect')].map(r => r.height.baseVal.value)")
        shares = [slots / max(routing.slots) for slots in routing.slots]
        assert [height / max(heights) for height in heights] == pytest.approx(shares, abs=1e-3)
        assert page.evaluate("document.getElementById('imbalance').textContent") == f"{routing.imbalance:.2f}"
        assert page.errors == []
