"""Blocks alone: their programs, and ``python -m samoyeds_compile.repro``."""

import json

import pytest
import torch

from samoyeds_compile import repro
from tests.blocks import Block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two graphs of one block each."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("repro")
    for block in (Block(bias=True), Block("gathered")):
        torch._dynamo.reset()
        torch.compile(block, backend="samoyeds", options={"base": "eager", "dump": path})(torch.randn(6, 16))
    return path


@pytest.mark.parametrize("block", ["0/0", "1/0"])
def test_block_replays(folder, block, capsys):
    assert repro.main([str(folder), block, "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in runs] == [0, 1, 2]
    assert all(run["problem"] == "" and run["deviation"] < 1e-5 for run in runs)


def test_wrong_replacement_is_seen(folder, capsys, tmp_path):
    program = folder / "graph_000" / "blocks" / "0" / "block.py"
    wrong = tmp_path / "graph_000" / "blocks" / "0" / "block.py"
    wrong.parent.mkdir(parents=True)
    text = program.read_text()
    assert text.count("'concatenated'") == 1
    wrong.write_text(text.replace("'concatenated'", "'interleaved'"))
    (tmp_path / "graph_000" / "before.py").write_text("")
    assert repro.main([str(tmp_path / "graph_000"), "0", "--seeds", "1"]) == 1
    assert "deviates by" in capsys.readouterr().out


@pytest.mark.parametrize(
    "block, problem", [("0", "is in several graphs"), ("0/7", "is not there"), ("x", "is not there")]
)
def test_no_such_block(folder, block, problem, capsys):
    assert repro.main([str(folder), block]) == 2
    error = capsys.readouterr().err
    assert problem in error and "000/0, 001/0" in error
