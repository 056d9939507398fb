"""What PyTorch's own tools see: tlparse, TORCH_LOGS, TORCH_COMPILE_DEBUG, the profiler, the compiler bisector."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._inductor.compiler_bisector import CompilerBisector

from samoyeds_compile import Report, rewrite
from tests.blocks import Block

PROGRAM = """
import torch
from tests.blocks import Block

with torch.no_grad():
    torch.compile(Block(), backend="samoyeds", options={"base": "eager"})(torch.randn(6, 16))
"""


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A process under all of them: its folder, and what it wrote to its error stream."""
    folder = tmp_path_factory.mktemp("traced")
    environment = {
        **os.environ,
        "TORCH_TRACE": str(folder / "trace"),
        "TORCH_LOGS": "+samoyeds_compile",
        "TORCH_COMPILE_DEBUG": "1",
        "TORCH_COMPILE_DEBUG_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_torch_logs(traced):
    assert "1 of 1 MoE blocks rewritten" in traced[1]


def test_debug_folder_has_the_dump(traced):
    (report,) = traced[0].glob("torch_compile_debug/run_*/samoyeds/report.html")
    assert (report.parent / "graph_000" / "after_lower.py").exists()


def test_tlparse_shows_our_artifacts(traced):
    tlparse = shutil.which("tlparse", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if tlparse is None:
        pytest.skip("tlparse is not installed")
    (log,) = (traced[0] / "trace").glob("*.log")
    out = traced[0] / "parsed"
    done = subprocess.run([tlparse, str(log), "-o", str(out), "--no-browser"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {path.name.rsplit("_", 1)[0] for path in out.rglob("samoyeds_*")}
    assert names >= {"samoyeds_report", "samoyeds_summary", "samoyeds_after_rewrite", "samoyeds_after_lower"}
    (summary,) = out.rglob("samoyeds_summary*")
    assert "1 of 1 MoE blocks rewritten" in summary.read_text()


def test_no_text_is_made_if_nobody_listens(monkeypatch):
    """Printing a graph takes longer than rewriting it."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    monkeypatch.setattr(torch.fx.GraphModule, "print_readable", None)
    report = Report()
    torch.compile(Block(), backend="samoyeds", options={"base": "eager", "report": report})(torch.randn(6, 16))
    assert report.rewritten and report.graphs[0].problem is None


def test_profiler_names_our_ops():
    compiled = torch.compile(Block(), backend="samoyeds", options={"base": "eager"})
    x = torch.randn(6, 16)
    with torch.no_grad():
        compiled(x)
        with torch.profiler.profile() as profile:
            compiled(x)
    assert "samoyeds::experts_dense" in {event.name for event in profile.events()}


@pytest.mark.inductor
def test_bisector_finds_the_block(monkeypatch):
    """One of two blocks is rewritten wrongly; the bisector says which step, and which block."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(Block(bias=True), Block()), torch.randn(6, 16)
    right = rewrite.rewrite_region

    def wrong(region):
        if region.up.bias is None:
            region.activation = "relu(gate) * up"
        return right(region)

    def works():
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.allclose(torch.compile(model, backend="samoyeds")(x), model(x), atol=1e-4)

    monkeypatch.setenv("SAMOYEDS_BASE", "eager")
    monkeypatch.setenv("SAMOYEDS_VALIDATE", "0")
    assert works()
    monkeypatch.setattr(rewrite, "rewrite_region", wrong)
    found = CompilerBisector.do_bisect(works)
    assert found is not None and (found.backend, found.subsystem) == ("samoyeds", "samoyeds_rewrite")
    assert found.bisect_number == 1 and found.debug_info is not None  # counted from 0
    assert found.debug_info.startswith("1 (") and "blocks.py" in found.debug_info, "the module and the line"
