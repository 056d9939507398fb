"""The pass: plans reach kernels, the report and the dump; tokens stay a symbol; results and gradients stay the same."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import nn

from samoyeds_compile import Report
from samoyeds_compile.layout import machine
from samoyeds_compile.layout.calibrate import calibrate
from samoyeds_compile.layout.machine import Machine
from samoyeds_compile.layout.rates import Kernel, Rates
from samoyeds_compile.ops import dense_experts
from samoyeds_compile.options import LAYOUTS
from tests.blocks import Block


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def make_block() -> nn.Module:
    torch.manual_seed(0)
    return Block(hidden=32, experts=4)


def compiled(block: nn.Module, report: Report | None = None, **options: object) -> nn.Module:
    return torch.compile(block, backend="samoyeds", options={"base": "eager", "report": report or Report(), **options})


def layouts_of(report: Report) -> list:
    return [layout for graph in report.graphs for layout in graph.layouts]


def test_same_results_with_every_choice() -> None:
    block, x = make_block(), torch.randn(40, 32)
    with torch.no_grad():
        expected = block(x)
        for choice in LAYOUTS:
            report = Report()
            torch.testing.assert_close(compiled(block, report, layouts=choice)(x), expected)
            assert layouts_of(report)[0].by_rows == ("" if choice == "cheapest" else "xh")
            torch.compiler.reset()


def test_tokens_stay_a_symbol() -> None:
    """One graph for all numbers of tokens; the kernel decides."""
    block, report = make_block(), Report()
    model = torch.compile(block, backend="samoyeds", dynamic=True, options={"base": "eager", "report": report})
    with torch.no_grad():
        for tokens in (3, 500, 17, 90):
            x = torch.randn(tokens, 32)
            torch.testing.assert_close(model(x), block(x))
    assert len(report.graphs) == len(layouts_of(report)) == 1


def test_calls_decide_between_kernel_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks [E, in, out], whose kernel is for few tokens: one graph, whatever the number of tokens."""
    block, report, without = make_block(), Report(), []
    for name in ("gate_up", "down"):
        weight = getattr(block, name)
        setattr(block, name, nn.Parameter(weight.detach().transpose(1, 2).contiguous().transpose(1, 2)))
    products = dense_experts.moe_experts
    monkeypatch.setattr(dense_experts, "moe_experts", lambda x, *rest: without.append(len(x)) or products(x, *rest))
    model = torch.compile(block, backend="samoyeds", dynamic=True, options={"base": "eager", "report": report})
    with torch.no_grad():
        for tokens in (3, 2000, 5):
            x = torch.randn(tokens, 32)
            torch.testing.assert_close(model(x), block(x))
    assert len(report.graphs) == 1 and layouts_of(report)[0].kernel == "float32 columns"
    assert without == [2000]


@pytest.mark.parametrize("choice", LAYOUTS)
def test_gradients_are_untouched(choice: str) -> None:
    block, x = make_block(), torch.randn(12, 32)
    expected = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    found = torch.autograd.grad(compiled(block, layouts=choice)(x).square().sum(), list(block.parameters()))
    for actual, gradient in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


def test_report_and_picture(tmp_path: Path) -> None:
    block, report = make_block(), Report()
    with torch.no_grad():
        compiled(block, report, dump=tmp_path)(torch.randn(8, 32))
    (layout,) = layouts_of(report)
    assert layout.regimes[0].first == 1 and layout.constants in ("defaults", "measured")
    assert layout.summary in " ".join(str(report).split()) and "gather -> expert_up" in str(report)
    picture = next(tmp_path.rglob("layouts.svg")).read_text()
    texts = {node.text for node in ElementTree.fromstring(picture).iter() if node.text}
    assert {"gather", "expert down", *(regime.name for regime in layout.regimes)} <= texts
    stored = json.loads(next(tmp_path.rglob("graph.json")).read_text())
    assert stored["layouts"][0]["few"] == layout.few


def test_constants_of_the_machine_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole pipeline: with other constants the kernel is told something else."""
    seen = []
    for rows in (1.0, 1e6):
        kernel = Kernel(Rates(rows, rows, rows), Rates(1e3, 1e3, 1e3, 16))
        made = Machine({name: kernel for name in machine.KINDS}, machine.defaults().library)
        monkeypatch.setattr("samoyeds_compile.layout.propagate.here", lambda made=made: made)
        report = Report()
        with torch.no_grad():
            compiled(make_block(), report)(torch.randn(8, 32))
        seen.append(layouts_of(report)[0].few)
        torch.compiler.reset()
    assert seen == ["1-", ""]


def test_kept_constants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is measured is read by later processes, unless the file is another's, damaged or another machine's."""
    monkeypatch.setenv("SAMOYEDS_CACHE_DIR", str(tmp_path))
    assert machine.here().origin == "defaults"
    made = Machine(machine.defaults().kernels, machine.defaults().library, move=7.0, origin="measured")
    path = machine.store(made)
    assert machine.here() == made and path.stat().st_mode & 0o077 == 0
    for spoil in (lambda text: text[:-9], lambda text: text.replace('"turn"', '"tern"')):
        path.write_text(spoil(path.read_text()))
        machine._stored.cache_clear()
        assert machine.here().origin == "defaults" and "cannot be read" in caplog.text
        machine.store(made)
    path.write_text(path.read_text().replace('"isas"', '"isas": [], "was"'))
    machine._stored.cache_clear()
    assert machine.here().origin == "defaults"
    machine.store(made)
    path.chmod(0o666)
    machine._stored.cache_clear()
    assert machine.here().origin == "defaults"
    machine._stored.cache_clear()


def test_calibration_runs_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel with rows and with tiles; what is not asked for keeps its defaults."""
    seen: list[tuple[int, int]] = []

    def runner(name: str) -> object:
        return lambda tokens, few: seen.append((tokens, few))

    monkeypatch.setattr("samoyeds_compile.layout.calibrate.runner", runner)
    monkeypatch.setattr("samoyeds_compile.layout.calibrate._moves", lambda flush: (1.0, 2.0))
    found = calibrate(("float32 dense",))
    assert {few for _, few in seen} == {0, 62} and {n for n, _ in seen} == {1, 8, 16, 24, 32, 48}
    assert found.origin == "measured" and (found.move, found.turn) == (1.0, 2.0)
    assert found.kernels["bfloat16 dense"] == machine.defaults().kernels["bfloat16 dense"]


@pytest.mark.parametrize("name", ["float32 columns", "float32 1:2"])
def test_calibrated_blocks_are_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed gives the same numbers with rows and with tiles, and they are not all zero."""
    from samoyeds_compile.layout import calibrate as module

    monkeypatch.setattr(module, "HIDDEN", 64)
    monkeypatch.setattr(module, "WIDTH", 32)
    run = module.runner(name)
    assert run is not None
    rows, tiles = run(5, 62), run(5, 0)
    assert isinstance(rows, torch.Tensor) and float(rows.abs().max()) > 0
    torch.testing.assert_close(rows, tiles)
