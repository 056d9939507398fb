"""``python -m benchmarks.cpu`` on a tiny block: the structure of what it writes, and going on with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu import __main__ as benchmark
from benchmarks.cpu import roofline, timing
from tests.benchmarks.tiny import SHARED

pytestmark = pytest.mark.inductor
PEERS = ("eager", "inductor", "mm", "onednn", "mkl")
OURS = ("samoyeds dense", "samoyeds 1:2:32")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(benchmark.SHAPES, "tiny", SHARED)
    monkeypatch.setattr(benchmark, "Flush", lambda: lambda: None)
    monkeypatch.setattr(roofline, "REPEATS", 1)
    monkeypatch.setattr(timing, "MOST", 5)


def run(path: Path, *more: str, tokens: str = "8") -> dict[str, Any]:
    given = [
        "--shapes",
        "tiny",
        "--patterns",
        "dense",
        "1:2:32",
        "--dtypes",
        "fp32",
        "--threads",
        "1",
        "--seconds",
        "0",
    ]
    benchmark.main([*given, "--tokens", tokens, "--json", str(path), *more])
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_run_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.json"
    content = run(path)
    assert content["rooflines"]["1"]["read"] > 0 and content["rooflines"]["1"]["fma"] > 0
    (row,) = content["rows"]
    there = {name for name in PEERS if name not in row["skipped"]}
    assert {"eager", "inductor", "mm"} <= there
    assert set(row["ms"]) == set(row["rate"]) == {*OURS, *there}
    assert all(set(row["ratio"][arm]) == {*there, "best dense"} for arm in OURS)
    assert row["best dense"] in there - {"eager", "inductor"}
    assert (row["shape"], row["dtype"], row["threads"], row["tokens"]) == ("tiny", "fp32", 1, 8)
    assert max(row["deviation"].values()) < 1e-5
    assert row["kernel"]["1:2:32"].startswith("kernel of packed experts, float32 1:2:32+2:4")
    assert row["rounds"]["kept"] == row["rounds"]["of"] == 5
    assert "Tiny with shared experts" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").stat().st_size > 10_000

    monkeypatch.setattr(benchmark, "measure_point", lambda *args: pytest.fail("measured again"))
    assert run(path, "--resume")["rows"] == [row]
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        run(path, "--resume", tokens="9")
    assert json.loads(path.read_text())["rows"] == [row]


def test_quick_is_a_part_of_the_full_plan() -> None:
    quick, full = (benchmark.plan_of(benchmark.parse(given)) for given in (["--quick"], []))
    for field in ("shapes", "patterns", "peers", "dtypes", "tokens", "threads"):
        assert set(getattr(quick, field)) <= set(getattr(full, field)), field
