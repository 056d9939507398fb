"""Exported programs with rewritten blocks: run, saved, compiled ahead of time, loaded in a second process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samoyeds_compile import OptionError, Report
from samoyeds_compile.passes import rewrite_exported
from tests.blocks import Block

ROOT = Path(__file__).parents[2]
LOAD = """
import sys, torch
import samoyeds_compile
from torch._inductor import aoti_load_package
folder = sys.argv[1]
inputs = torch.load(f"{folder}/inputs.pt")
load = {"exported": lambda p: torch.export.load(p).module(), "compiled": aoti_load_package}
results = {}
with torch.no_grad():
    for name in sys.argv[2:]:
        model = load[name](f"{folder}/{name}.pt2")
        results[name] = [model(x) for x in inputs]
torch.save(results, f"{folder}/results.pt")
"""
"""A second process that knows neither the model nor where it came from."""


class Model(nn.Module):
    """Both surfaces of transformers, as its demo models have them, with norms and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(16) for _ in range(2))
        self.blocks = nn.ModuleList([Block("grouped"), Block("gathered", bias=True)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return x


class Plain(nn.Module):
    """Experts without a gate, whose result is the output of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.up, self.down = (nn.Parameter(torch.randn(4, *shape) * 0.3) for shape in ((24, 16), (16, 24)))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        h = nn.functional.gelu(torch.einsum("th,tkih->tki", x, self.up[ids]))
        return (torch.einsum("tki,tkhi->tkh", h, self.down[ids]) * weights.unsqueeze(-1)).sum(1)


def exported(model: nn.Module, **options: Any) -> tuple[torch.export.ExportedProgram, Report]:
    """Exported for any number of tokens, and rewritten."""
    report, tokens = Report(), {"x": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(6, 16),), dynamic_shapes=tokens)
        return rewrite_exported(program, {"report": report, **options}), report


def ops_of(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("samoyeds")}


def test_rewritten_and_equal() -> None:
    model = Model().eval()
    program, report = exported(model)
    assert [block.family for block in report.rewritten] == [block.family for block in report.blocks]
    assert {block.family for block in report.rewritten} == {"grouped", "gathered"}
    assert any("experts" in op for op in ops_of(program))
    for tokens in (6, 1, 11):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.inductor
@pytest.mark.parametrize(("kind", "blocks"), [(Model, 2), (Plain, 1)])
def test_second_process(tmp_path: Path, kind: type[nn.Module], blocks: int) -> None:
    """Saved as a program, and compiled by AOTInductor; both loaded elsewhere give what the model gives here."""
    model = kind().eval()
    program, report = exported(model)
    assert len(report.rewritten) == blocks
    inputs = [torch.randn(tokens, 16) for tokens in (6, 3, 20)]
    torch.save(inputs, tmp_path / "inputs.pt")
    torch.export.save(program, tmp_path / "exported.pt2")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
        expected = [model(x) for x in inputs]
    command = [sys.executable, "-c", LOAD, str(tmp_path), "exported", "compiled"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-3000:]
    for found in torch.load(tmp_path / "results.pt").values():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_options() -> None:
    program, report = exported(Model().eval(), rewrite=False)
    assert ops_of(program) == set() and report.rewritten == [] and len(report.blocks) == 2
    with pytest.raises(OptionError, match="unknown"):
        rewrite_exported(program, {"unknown": 1})
