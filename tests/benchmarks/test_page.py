"""docs/benchmarks.md is what the command writes from the committed results."""

import json
import os
import re

import pytest

from benchmarks.common import RESULTS
from benchmarks.page import hook
from benchmarks.page.__main__ import PAGE, render
from benchmarks.page.figures import FIGURES, draw
from benchmarks.page.sections import SECTIONS
from benchmarks.page.table import by_tokens, ratio

MACHINE = {
    "cpu": "a",
    "cores": 2,
    "threads": 1,
    "torch": "2",
    "python": "3",
    "commit": "c",
    "date": "d",
    "load_before": 3,
}


def test_page_is_made_of_the_results():
    """SAMOYEDS_ACCEPT=1 accepts a new text."""
    text = render(RESULTS)
    if os.environ.get("SAMOYEDS_ACCEPT"):
        PAGE.write_text(text, encoding="utf-8")
    assert text == PAGE.read_text(encoding="utf-8"), f"{PAGE.name} differs; `python -m benchmarks.page` writes it"


def test_every_result_is_on_the_page():
    text = PAGE.read_text(encoding="utf-8")
    for path in RESULTS.glob("*.json"):
        assert f"### {path.name}\n" in text
    for path in RESULTS.glob("*.png"):
        assert f"](../benchmarks/results/{path.name})" in text


def test_what_is_missing_is_named(tmp_path):
    text = render(tmp_path)
    for section in SECTIONS:
        assert f"## {section.title}\n" in text
    assert text.count("\nNot measured. To measure: ") == len(SECTIONS)


def test_losses_and_disturbed_points_are_marked():
    assert ratio(1.065) == "1.07"
    assert [ratio(0.994), ratio(0.996), ratio(1.2), ratio(0.5, quiet=False)] == [
        "**0.99**",
        "1.00",
        "1.20",
        "**0.50** ~",
    ]
    rows = [
        {"shape": "a", "tokens": 1, "x": 0.5},
        {"shape": "a", "tokens": 16, "x": 2.0},
        {"shape": "b", "tokens": 16, "x": 1},
    ]
    table = by_tokens("", rows, ("shape",), lambda row: row["x"])
    assert table.header == ["shape", "1 token", "16"]
    assert table.lines == [["a", "**0.50**", "2.00"], ["b", "-", "1.00"]]


def test_files_that_are_not_kept_yet(tmp_path):
    peak = {"shape": "mixtral", "dtype": "fp32", "pattern": "2:4", "tokens": 16, "peak_mib": 2.0, "bound_mib": 1.0,
            "holds": False, "kernel": ""}  # fmt: skip
    dump = {"layers": 24, "rounds": 3, "seconds": {"off": 30.0, "on": 33.0, "off again": 30.3}, "on/off": 1.1,
            "off again/off": 1.01, "dump_bytes": 2_000_000}  # fmt: skip
    for stem, row in (("cpu_peak", peak), ("dump", dump)):
        (tmp_path / f"{stem}.json").write_text(json.dumps({"machine": MACHINE, "rows": [row]}))
    text = render(tmp_path)
    assert "| mixtral | fp32 | 2:4 | 16 | 2.0 | 1.0 | **no** |" in text
    assert "| 24 | 30.0 | 33.0 | 30.3 | 1.10 | 1.01 | 2.0 |" in text


def test_further_files_and_a_gpu(tmp_path):
    cpu = {"shape": "mixtral", "dtype": "bf16", "threads": 1, "tokens": 1024, "rounds": {"quiet": False},
           "ratio": {"samoyeds dense": {"inductor": 0.9}}}  # fmt: skip
    gpu = {"shape": "s", "tokens": 1, "name": "ours", "work": "block", "ms": 1.0, "ratio": None}
    (tmp_path / "cpu_1024.json").write_text(json.dumps({"machine": MACHINE, "rows": [cpu]}))
    (tmp_path / "gpu-x.json").write_text(json.dumps({"machine": {"device": "x"}, "rows": [gpu]}))
    text = render(tmp_path)
    assert "--tokens 1024 --json benchmarks/results/cpu_1024.json" in text
    assert "| mixtral | bf16 | dense | **0.90** ~ |" in text
    assert "other processes were running: load average 3" in text
    assert "| s | 1 | ours | block | 1.0000 | - |" in text
    assert "GPUs" not in re.search(r"Not measured, or not kept: (.*)\.", text)[1]


@pytest.mark.parametrize("stem", FIGURES)
def test_figures(tmp_path, stem):
    pytest.importorskip("matplotlib")
    (tmp_path / f"{stem}_2.json").write_text((RESULTS / f"{stem}.json").read_text())
    draw(tmp_path / f"{stem}_2.json")
    assert (tmp_path / f"{stem}_2.png").read_bytes().startswith(b"\x89PNG")


def test_links_of_the_site():
    assert (
        hook.on_page_markdown("![a](../benchmarks/results/cpu.png) [b](cpu.md)")
        == "![a](benchmarks/results/cpu.png) [b](cpu.md)"
    )
