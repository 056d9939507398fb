"""``python -m benchmarks.generate``: the clock, graphs that are compiled too late, and, slow, a run."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import generate
from benchmarks.cpu import timing


def test_the_first_token_does_not_count() -> None:
    moments = iter([0.0, 5.0, 5.1, 5.2, 5.5])
    clock = generate.Clock(lambda: next(moments))
    for token in range(5):  # the prompt, then four tokens
        clock.put(torch.tensor(token))
    assert clock.milliseconds == pytest.approx(1e3 * 0.5 / 3)


def test_late_graphs_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST", 5)
    torch._dynamo.reset()

    @torch.compile(backend="eager", dynamic=False)
    def double(x: Tensor) -> Tensor:
        return 2 * x

    sizes = iter(range(2, 100))
    with pytest.raises(RuntimeError, match="compiled while"):
        generate.alternate_compiled({"a": lambda: float(double(torch.ones(next(sizes))).sum())}, 1, 0)
    assert generate.alternate_compiled({"a": lambda: float(double(torch.ones(2)).sum())}, 1, 0).median("a") == 4


@pytest.mark.slow
@pytest.mark.inductor
def test_run(tmp_path: Path) -> None:
    path = tmp_path / "generate.json"
    generate.main(["--models", "small_lm", "--tokens", "8", "--seconds", "0", "--json", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    ours = {"samoyeds dense", "samoyeds 2:4", "samoyeds 1:2:32"}
    assert set(row["tokens_per_second"]) == {"eager", "inductor", *ours}
    assert set(row["ratio"]) == set(row["deviation"]) == ours
    assert 0 < row["moe_share_of_inductor"] < 1 < row["most_possible"]
    assert all(block["rewritten"] == block["of"] == 3 for block in row["blocks"].values())
    assert row["blocks"]["samoyeds 2:4"]["kernel"].startswith("kernel of packed experts")
    assert max(row["deviation"].values()) < 0.1
