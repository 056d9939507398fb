"""A second process finds everything that the first one compiled in Inductor's caches on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from samoyeds_compile import Report
from tests.models import families

name, implementation = sys.argv[1:]
entry = next(e for e in families.decorated_experts_classes() if e.id == name)
model = families.build(entry)
model.set_experts_implementation(implementation)
block, report, numbers = model.model.layers[0].mlp, Report(), []
forward = torch.compile(block, backend="samoyeds", options={"report": report})
x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
for train in (False, True):
    with torch.set_grad_enabled(train):
        out = forward(x)
        out = out[0] if isinstance(out, tuple) else out
    numbers.append(out.flatten().tolist())
out.square().sum().backward()
numbers += [p.grad.flatten().tolist() for p in block.parameters()]
print(json.dumps({
    "inductor": {k: v for k, v in counters["inductor"].items() if k.startswith("fxgraph_cache")},
    "autograd": {k: v for k, v in counters["aot_autograd"].items() if k.startswith("autograd_cache")},
    "rewritten": len(report.rewritten),
    "numbers": numbers,
}))
"""
"""Inference and training of one block; prints cache counters and results."""


def run(cache: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """What the script says in a process of its own with this cache directory."""
    ours = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env=os.environ | ours | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def compiled_nothing(run: dict[str, Any]) -> bool:
    """All of inference, forward and backward came from the caches."""
    counts = [(name, count) for kind in ("inductor", "autograd") for name, count in run[kind].items() if count]
    missed = [name for name, _ in counts if "miss" in name or "bypass" in name]
    return not missed and {("fxgraph_cache_hit", 3), ("autograd_cache_hit", 2)} <= set(counts)


def compiled_everything(run: dict[str, Any]) -> bool:
    return run["inductor"].get("fxgraph_cache_miss") == 3 and run["autograd"].get("autograd_cache_miss") == 2


@pytest.mark.inductor
def test_second_process_compiles_nothing(tmp_path: Path) -> None:
    first, second = (run(tmp_path, "gpt_oss", "batched_mm") for _ in range(2))
    assert first["rewritten"] == second["rewritten"] == 2
    assert compiled_everything(first) and compiled_nothing(second), (first, second)
    assert second["numbers"] == first["numbers"]


@pytest.mark.inductor
def test_original_and_rewritten_graph_do_not_mix(tmp_path: Path) -> None:
    """With rewriting switched off a process caches another graph; the next must not take that one, but its own."""
    original = run(tmp_path, "mixtral", "grouped_mm", SAMOYEDS_REWRITE="0")
    first, second = (run(tmp_path, "mixtral", "grouped_mm") for _ in range(2))
    assert [r["rewritten"] for r in (original, first, second)] == [0, 2, 2]
    assert compiled_everything(first) and compiled_nothing(second), (first, second)
    assert second["numbers"] == first["numbers"]
    for actual, expected in zip(first["numbers"], original["numbers"], strict=True):
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-4)
