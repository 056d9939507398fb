"""What the CPU benchmark consists of: products, sizes, rounds, results, tables. No test looks at a time."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks.cpu import timing
from benchmarks.cpu.products import LIBRARIES, missing, products_of
from benchmarks.cpu.results import Results, ResumeError
from benchmarks.cpu.shapes import Shape, build, references, routing, sizes
from benchmarks.cpu.tables import markdown
from benchmarks.cpu.timing import Round, Timing, Usage, alternate
from tests.benchmarks.tiny import PLAIN, SHARED

MACHINE = {"cpu": "a", "cores": 2, "torch": "b", "commit": "c"}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def tokens(count: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, count, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("shape", [PLAIN, SHARED], ids=["plain", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_compute_the_products(library: str, dtype: torch.dtype, shape: Shape) -> None:
    absent = missing([library], dtype)
    if absent:
        pytest.skip(str(absent))
    block, x = build(shape, dtype, ["dense"]).dense, tokens(dtype=dtype)
    for product in products_of(block, routing(block, x), x):
        expected = product.rows_MI.double() @ product.weight_OI.double().t()
        actual = LIBRARIES[library](product)()
        assert (actual - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_mkl_packs_no_bfloat16() -> None:
    """An arm that is not there is named, and the others go on."""
    assert "mkl" in missing(["mm", "mkl"], torch.bfloat16)
    assert "mm" not in missing(["mm", "mkl"], torch.bfloat16)


@pytest.mark.parametrize("shape", [PLAIN, SHARED], ids=["plain", "shared"])
def test_products_are_all_that_the_block_multiplies(shape: Shape) -> None:
    block, x = build(shape, torch.float32, ["dense"]).dense, tokens()
    ids_TK = routing(block, x)
    products = products_of(block, ids_TK, x)
    router = 2 * 16 * sum(p.numel() for name, p in block.named_parameters() if name.startswith("gate."))
    assert sum(2 * p.rows_MI.shape[0] * p.weight_OI.numel() for p in products) + router == sizes(block, ids_TK, x).flops


def test_sizes_of_packed_experts() -> None:
    """A quarter of the experts' work, all of the router's; bytes as they are stored, of the experts with tokens."""
    blocks, x = build(PLAIN, torch.float32, ["1:2:32"]), tokens(1)
    ids_TK = routing(blocks.dense, x)
    assert ids_TK.unique().numel() == 2
    packed, dense = sizes(blocks.sparse["1:2:32"], ids_TK, x, 0.25), sizes(blocks.dense, ids_TK, x)
    router, expert = 4 * 64, 3 * 64 * 96
    assert dense.flops == packed.dense_flops == 2 * (router + 2 * expert)
    assert packed.flops == 2 * (router + 2 * expert // 4)
    assert dense.bytes == 4 * (router + 2 * expert + 2 * 64)
    stored = expert // 4 * 4 + expert // 32 * 2 + expert // 64  # values; 16 bits for 16 kept of 32; a byte for 32 of 64
    assert packed.bytes == 4 * (router + 2 * 64) + 2 * stored


def test_references_are_those_of_each_pattern() -> None:
    blocks = build(PLAIN, torch.float32, ["dense", "2:4", "1:2:32"])
    found = references(blocks, [tokens()])
    assert torch.equal(found["dense"][0], found["2:4"][0])
    assert not torch.equal(found["2:4"][0], found["1:2:32"][0])
    for name, block in blocks.sparse.items():
        torch.testing.assert_close(block(tokens()), found[name][0])


def usages(monkeypatch: pytest.MonkeyPatch, shares: list[float]) -> None:
    """Pretend that others use these shares of two cores in the rounds."""
    moments, all_cores = [], 0.0
    for share in shares:
        moments += [Usage(all_cores, 0.0, 0.0), Usage(all_cores + share * 2, 0.0, 1.0)]
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    moment = iter(moments)
    monkeypatch.setattr(timing.Usage, "now", classmethod(lambda cls: next(moment)))


def counted(names: str, order: list[str]) -> dict[str, object]:
    """Timers that write down when they are called, and return 1, 2, 3 ..."""
    number = itertools.count(1)
    return {name: lambda name=name: (order.append(name), float(next(number)))[1] for name in names}


def test_rounds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    usages(monkeypatch, [0.9] * 5)
    order: list[str] = []
    found = alternate(counted("abc", order), threads=1, seconds=0)
    assert "".join(order) == "abccbaabccbaabc"
    assert found.quiet and found.measured == len(found.rounds) == 5
    assert found.rounds[1].ms == {"c": 4, "b": 5, "a": 6}


def test_rounds_with_foreign_load_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    usages(monkeypatch, [0.5, 0.0, 0.04, 0.2, 0.0, 0.0, 0.01])
    monkeypatch.setattr(timing, "MOST", 7)
    found = alternate(counted("a", []), threads=2, seconds=60)
    assert found.quiet and found.measured == 7
    assert [r.ms["a"] for r in found.rounds] == [2, 3, 5, 6, 7]
    assert found.summary() == {"kept": 5, "of": 7, "foreign": 0.0, "quiet": True}


def test_the_quietest_rounds_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    usages(monkeypatch, [0.5, 0.3, 0.4, 0.9, 0.6, 0.7])
    monkeypatch.setattr(timing, "MOST", 6)
    found = alternate(counted("a", []), threads=2, seconds=60)
    assert not found.quiet and found.measured == 6
    assert sorted(r.ms["a"] for r in found.rounds) == [1, 2, 3, 5, 6]


def test_ratio_is_the_median_over_rounds() -> None:
    rounds = [Round({"a": 1, "b": 2}, 0), Round({"a": 10, "b": 30}, 0), Round({"a": 1, "b": 100}, 0)]
    assert Timing(rounds, 3, True).ratio("b", "a") == 3


def row(**changes: object) -> dict[str, object]:
    rounds = {"kept": 5, "of": 5, "foreign": 0.0, "quiet": True}
    rate = {"GB/s": 1.0, "GF/s": 2.0, "dense GF/s": 2.0, "roofline": 0.5}
    return {
        "shape": "mixtral", "dtype": "fp32", "threads": 1, "tokens": 4, "tokens_per_expert": 1.0, "rounds": rounds,
        "ms": {"samoyeds 2:4": 1.0, "eager": 2.0}, "ratio": {"samoyeds 2:4": {"eager": 2.0}}, "best dense": None,
        "rate": {"samoyeds 2:4": rate, "eager": rate}, "skipped": {"mkl": "not built"}, **changes,
    }  # fmt: skip


def test_results_go_on(tmp_path: Path) -> None:
    path, key, arms = tmp_path / "folder" / "cpu.json", ("mixtral", "fp32", 1, 4), ["samoyeds 2:4", "eager", "mkl"]
    results = Results.open(path, MACHINE, resume=True)
    assert results.lacks(key, arms)
    results.add(row())
    again = Results.open(path, MACHINE, resume=True)
    assert not again.lacks(key, arms) and again.lacks(("mixtral", "fp32", 2, 4), arms)
    assert again.lacks(key, [*arms, "inductor"])
    assert not Results.open(path, MACHINE, resume=False).rows
    again.add(row(rounds={"kept": 5, "of": 9, "foreign": 0.3, "quiet": False}))
    disturbed = Results.open(path, MACHINE, resume=True)
    assert disturbed.lacks(key, arms) and len(disturbed.rows) == 1


def test_results_of_other_code_are_not_mixed(tmp_path: Path) -> None:
    Results.open(tmp_path / "cpu.json", MACHINE, resume=False).write()
    with pytest.raises(ResumeError, match="another commit"):
        Results.open(tmp_path / "cpu.json", {**MACHINE, "commit": "d"}, resume=True)


def test_page_marks_what_was_disturbed() -> None:
    rows = [row(), row(tokens=16, rounds={"kept": 5, "of": 9, "foreign": 0.3, "quiet": False})]
    page = markdown({"machine": MACHINE, "rooflines": {}, "rows": json.loads(json.dumps(rows))})
    assert "| mixtral | 4 | 1.0 | 2.00 / - / - |" in page
    assert "| mixtral | 16 ~ | 1.0 | 2.00 / - / - |" in page
    assert "left out: mkl, fp32: not built" in page
