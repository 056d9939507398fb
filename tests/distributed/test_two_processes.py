"""Two processes under torchrun, on gloo: each way to split a model equals one process, blocks rewritten."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives  # registers the ops

from samoyeds_compile import backend
from samoyeds_compile.options import Options

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
TOLERANCE = 1e-5
Results = list[dict[str, Any]]
"""What `tests.distributed.cases` says of each rank."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All cases in one launch, since importing costs more than running them."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.cases", str(folder)],
        capture_output=True, text=True, timeout=540, env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def of(results: Results, name: str, tolerance: float = TOLERANCE) -> Results:
    """What both ranks say of a case."""
    found = [result[name] for result in results]
    for rank in found:
        assert "error" not in rank, rank["error"]
        assert rank["deviation"] < tolerance and rank["discarded"] == []
    return found


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("ddp", 2), ("ddp_without_its_optimizer", 2), ("fsdp", 2), ("fsdp_packed", 1), ("tensor_parallel", 1)],
)
def test_equals_one_process(results: Results, name: str, blocks: int) -> None:
    for rank in of(results, name):
        assert (rank["rewritten"], rank["left"], rank["agree"]) == (blocks, [], "")


def test_buckets_that_cut_a_block(results: Results) -> None:
    """Nothing is rewritten, nothing is wrong, and the report says what to do."""
    for rank in of(results, "ddp_small_buckets"):
        assert rank["rewritten"] == 0 and rank["agree"] == ""
        assert rank["left"] and all("torch._dynamo.config.optimize_ddp = False" in reason for reason in rank["left"])


def test_all_to_all_of_transformers(results: Results) -> None:
    """Uneven routing, an expert without tokens, a rank without tokens: ranks compile different numbers of graphs."""
    ranks = of(results, "all_to_all")
    assert all(rank["rewritten"] >= 1 and rank["left"] == [] and rank["agree"] == "" for rank in ranks)
    assert ranks[0]["graphs"] != ranks[1]["graphs"]
    assert all(rank["collectives"] == ["all_to_all_single"] for rank in ranks)


def test_all_reduce_of_transformers(results: Results) -> None:
    """Experts of other ranks are sentinels; gradients of what the ranks share are summed in the same graph."""
    for rank in of(results, "all_reduce"):
        assert (rank["graphs"], rank["rewritten"], rank["left"], rank["agree"]) == (1, 1, [], "")
        assert rank["collectives"] == ["all_reduce, all_reduce, all_reduce"]


def test_dispatch_of_torchtitan(results: Results) -> None:
    """One graph with all three exchanges in it, in order, over sizes that are known only when it runs.

    Uneven routing, an expert without tokens, a rank without tokens; the experts between the exchanges are rewritten.
    In bfloat16, of which each product rounds by up to 0.004.
    """
    for rank in of(results, "torchtitan", tolerance=0.02):
        assert (rank["graphs"], rank["rewritten"], rank["left"], rank["agree"]) == (1, 1, [], "")
        assert rank["collectives"] == ["all_to_all_single, all_to_all_single, all_to_all_single"]


def test_ranks_that_differ_are_told_so(results: Results) -> None:
    first, second = of(results, "ranks_apart")
    assert (first["rewritten"], second["rewritten"]) == (2, 0)
    for rank in (first, second):
        assert "ranks compiled different graphs" in rank["agree"]
        assert "rank 0: " in rank["agree"] and "samoyeds::moe_experts" in rank["agree"] and "as it is" in rank["agree"]


def test_a_moved_collective_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a rewrite to take a collective along, the graph would be put back as it came, and the report say so."""

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    ops = torch.ops._c10d_functional
    first = graph.call_function(ops.all_reduce.default, (x, "sum", "0"))
    second = graph.call_function(ops.all_gather_into_tensor.default, (x, 2, "0"))
    graph.output((first, second))
    gm = torch.fx.GraphModule({}, graph)
    monkeypatch.setattr(backend, "keep_sound", lambda *args: [None])
    monkeypatch.setattr(backend, "rewrite_blocks", lambda matches: first.prev.append(second))
    report = backend.optimize(gm, [torch.ones(2)], Options())
    assert report.collectives == ["all_reduce", "all_gather_into_tensor"]
    assert "changed collectives" in (report.problem or "")
    order = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert order == [ops.all_reduce.default, ops.all_gather_into_tensor.default]
