"""The step in the pipeline: option, validation, dynamic sizes, contexts, nested graphs, report, dump, Inductor."""

import dataclasses
import re
import runpy

import pytest
import torch
import torch.utils.checkpoint

from samoyeds_compile import Options, Report
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.match.driver import match_regions
from samoyeds_compile.routers import driver
from samoyeds_compile.routers.parts import read_choice
from samoyeds_compile.routers.validate import RouterValidator
from tests.routers.routed import Routed, assert_same, compiled, specs
from tests.routers.test_match import grouped


def qwen(logits, block):
    weights, ids = torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1).topk(2)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


def through_backend(model, **options):
    report = Report()
    options = {"base": "aot_eager", "report": report, **options}
    return torch.compile(model, backend="samoyeds", options=options), report


def test_off_by_default():
    model = Routed(qwen)
    forward, report = through_backend(model)
    assert_same(model, forward)
    (block,) = report.blocks
    assert (block.rewritten, block.router_fused, block.router_reason) == (True, False, None)
    assert "routers" not in [s.name for s in report.graphs[0].steps]
    assert "(fused)" not in str(report)


def test_option_and_variable(monkeypatch):
    assert Options.from_call(options={"fuse_routers": True}).fuse_routers
    monkeypatch.setenv("SAMOYEDS_FUSE_ROUTERS", "1")
    assert Options.from_call().fuse_routers
    assert not Options.from_call(options={"fuse_routers": False}).fuse_routers


@pytest.mark.parametrize("route", [qwen, grouped], ids=["softmax", "grouped"])
def test_report_and_dump(route, tmp_path):
    model = Routed(route)
    forward, report = through_backend(model, fuse_routers=True, dump=str(tmp_path))
    assert_same(model, forward)
    assert [s.name for s in report.graphs[0].steps].index("routers") == 4
    assert "(fused)" in re.sub(r"\s+|│", " ", str(report))
    program = tmp_path / "graph_000" / "after_routers.py"
    code = [line for line in program.read_text().splitlines() if not line.lstrip().startswith("#")]
    assert sum("torch.ops.samoyeds.router.default(" in line for line in code) == 1
    assert not any("topk(" in line for line in code)
    runpy.run_path(str(program), run_name="__main__")  # compares itself with before.py


@pytest.mark.inductor
@pytest.mark.parametrize("route", [qwen, grouped], ids=["softmax", "grouped"])
def test_inductor(route):
    model = Routed(route)
    forward, report = through_backend(model, fuse_routers=True, base="inductor")
    x = torch.randn(11, 16)
    for mine, theirs in zip(forward(x), model(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert report.blocks[0].router_fused


@pytest.mark.parametrize("route", [qwen, grouped], ids=["softmax", "grouped"])
def test_dynamic_tokens(route):
    model = Routed(route)
    forward, seen = compiled(model, validate=True, dynamic=True)
    for tokens in (7, 30, 2):
        assert_same(model, forward, tokens)
    ((_, report),) = seen
    assert report.blocks[0].router_fused


def reshaped_by_number(logits, block):
    """The number of tokens stands in the graph: only that many can be replayed."""
    tokens = logits.shape[0]
    scores = logits.sigmoid()
    group_scores = scores.view(tokens, 4, 2).topk(2, dim=-1)[0].sum(dim=-1)
    best = group_scores.topk(2, dim=-1)[1]
    mask = torch.zeros_like(group_scores).scatter_(1, best, 1).unsqueeze(-1).expand(tokens, 4, 2)
    ids = scores.masked_fill(~mask.reshape(tokens, 8).bool(), 0.0).topk(2)[1]
    return scores.gather(1, ids), ids


def test_number_of_tokens_in_the_graph():
    model = Routed(reshaped_by_number)
    forward, seen = compiled(model, validate=True, dynamic=False)
    assert_same(model, forward, 5)
    assert seen[0][1].blocks[0].router_reason is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", [qwen, grouped], ids=["softmax", "grouped"])
def test_autocast(route, dtype):
    """Around the model and inside of it; the scores are computed in the dtype in which they were."""

    class Inner(Routed):
        def forward(self, x):
            with torch.autocast("cpu", dtype=dtype):
                return super().forward(x)

    model = Inner(route)
    forward, seen = compiled(model, validate=True)
    x = torch.randn(9, 16)
    for mine, theirs in zip(forward(x), model(x), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-2, atol=2e-2)
    assert seen[0][1].blocks[0].router_reason is None


def test_checkpointed_layer():
    model = Routed(grouped)

    def forward(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    report = Report()
    fast = torch.compile(forward, backend="samoyeds",
                         options={"base": "aot_eager", "report": report, "fuse_routers": True})  # fmt: skip
    assert_same(model, fast)
    assert [b.router_fused for b in report.blocks] == [True]


# ---------------------------------------------------------------------------------------------- validation


def region_of(route):
    """The router that the matcher finds, on a graph as Dynamo captures it."""
    found = []

    def backend(gm, example_inputs):
        regions, _ = match_regions(read_graphs(gm))
        router = driver.match_router(read_choice(regions[0].expert_ids))
        validator = RouterValidator()
        found.append((router, validator.check(router), [validator.check(wrong) for wrong in spoilt(router)]))
        return gm.forward

    torch.compile(Routed(route), backend=backend)(torch.randn(5, 16))
    return found[0]


def spoilt(router):
    """The same router with one attribute wrong."""
    spec = router.spec
    changes = [
        {"scoring": "softmax" if spec.scoring == "sigmoid" else "sigmoid"},
        {"renormalise": "none"},
        {"epsilon": 0.5},
        {"scale": 3.0},
        {"out_dtype": torch.float64},
        {"top_k": spec.top_k + 1},
    ]
    if spec.n_group > 1:
        changes += [{"topk_group": 1}, {"n_group": 1}, {"group_score": "max"}, {"weights_from": "choice"}]
    return [dataclasses.replace(router, spec=dataclasses.replace(spec, **change)) for change in changes]


@pytest.mark.parametrize("route", [qwen, grouped], ids=["softmax", "grouped"])
def test_validation_refuses_what_is_wrong(route):
    router, problem, problems = region_of(route)
    assert problem is None
    assert len(problems) == len(spoilt(router)) and all(problems)


def test_a_refused_router_stays(monkeypatch):
    monkeypatch.setattr(RouterValidator, "check", lambda self, router: "it is wrong")
    model = Routed(qwen)
    forward, seen = compiled(model, validate=True)
    assert_same(model, forward)
    ((gm, report),) = seen
    assert (report.blocks[0].rewritten, specs(gm)) == (True, [])
    assert report.blocks[0].router_reason == "validation refused the fused router: it is wrong"


def test_a_defect_of_the_rule_costs_only_the_router(monkeypatch):
    def broken(choice):
        raise KeyError("oops")

    monkeypatch.setattr(driver, "match_softmax_topk", broken)
    model = Routed(qwen)
    forward, seen = compiled(model)
    assert_same(model, forward)
    ((_, report),) = seen
    assert (report.problem, report.blocks[0].rewritten) == (None, True)
    assert "internal error of the rule: KeyError" in report.blocks[0].router_reason


def test_router_behind_a_block():
    """Logits that are a block's output itself: that node is gone when routers are looked at."""

    class Chained(Routed):
        def __init__(self):
            super().__init__(qwen, hidden=8)
            self.second = Routed(lambda logits, block: logits.sigmoid().topk(2), hidden=8)

        def forward(self, x):
            logits, *first = super().forward(x)
            weights, ids = self.second.route(logits, self)
            return self.second.grouped(x, ids, weights), weights, ids, *first

    model = Chained()
    forward, seen = compiled(model)
    x = torch.randn(4, 8)
    for mine, theirs in zip(forward(x), model(x), strict=True):
        torch.testing.assert_close(mine, theirs)
    ((gm, report),) = seen
    assert [b.rewritten for b in report.blocks] == [True, True] and len(specs(gm)) == 1
    assert [b.router_reason for b in report.blocks] == [None, "the router reads the output of a block directly"]
