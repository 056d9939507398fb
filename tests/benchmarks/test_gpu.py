"""The benchmark for GPUs without one: every way through it, with tiny blocks. No test looks at a time."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from benchmarks.gpu import inputs, losses, report, weights, worker
from benchmarks.gpu.contender import BLOCK, PRODUCTS, Absent, Contender
from benchmarks.gpu.inputs import expected, make_inputs
from benchmarks.gpu.machine import DryMachine
from benchmarks.gpu.ours import contenders
from benchmarks.gpu.peers import PEERS, grouped_mm
from benchmarks.gpu.peers.sorting import padded_rows, sort
from benchmarks.gpu.rows import with_rates, with_ratios
from benchmarks.gpu.shapes import SHAPES, SMALL, TOKENS, Shape
from benchmarks.gpu.supervise import ROOT, measure
from benchmarks.gpu.worker import BrokenDevice, Worker

SHAPE, CPU, BF16 = SMALL[0], torch.device("cpu"), torch.bfloat16


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def contender(name, call, form="dense", **options) -> Contender:
    """``call`` of weights and inputs."""
    return Contender(name, form, lambda shape, w: lambda i: lambda: call(w, i), **options)


def exact(w, i) -> torch.Tensor:
    found = torch.zeros_like(i.x_TH)
    count = min(len(found), inputs.CHECKED)
    found[:count] = expected(w, i).to(found.dtype)
    return found


def events_of(found, tokens=(8, 1), excluded=(), machine=None) -> list[dict]:
    said: list[dict] = []
    Worker(machine or DryMachine(), SHAPE, BF16, said.append, float("inf"), frozenset(excluded)).run(found, tokens)
    return said


def named(said, event) -> list[str]:
    return [e["name"] for e in said if e["event"] == event]


def test_all_shapes_and_tokens_of_the_issue() -> None:
    assert sorted(TOKENS) == [1, 8, 64, 256, 1024, 4096, 16384] and len(SHAPES) == 5
    assert {shape.name for shape in SHAPES} >= {"mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b"}
    assert len({peer.name for peer in PEERS}) == len(PEERS) == 9


@pytest.mark.parametrize("form", [weights.DENSE, *weights.PATTERNS])
def test_weights(form) -> None:
    """Packed ones have the share of values that the pattern has, and the bytes."""
    shape = Shape("even", 2, 1, 256, 128, 1)
    found = weights.make(form, shape, BF16, CPU)
    up, down = found.of_expert(1)
    assert up.shape == (256, 256) and down.shape == (256, 128)
    assert float((up != 0).double().mean()) == pytest.approx(found.density, abs=0.02)
    stored = found.nbytes / (2 * 2 * shape.elements)
    assert stored == pytest.approx({"dense": 1, "2:4": 0.5625}.get(form, 0.283), abs=2e-3)


def test_grouped_products_compute_the_block() -> None:
    found, given = weights.make("dense", SHAPE, BF16, CPU), make_inputs(SHAPE, 9, BF16, CPU)
    out = grouped_mm.block(given.x_TH, given.ids_TK, given.weights_TK, found.up, found.down)
    assert inputs.error(out, expected(found, given)) < worker.TOLERANCE[BF16]


def test_sorting() -> None:
    given = make_inputs(SHAPE, 9, BF16, CPU)
    order = sort(given, SHAPE.experts)
    rows, ends = padded_rows(given, SHAPE.experts, 16)
    assert int(order.counts_E.sum()) == 18 and all(end % 16 == 0 for end in ends) and len(rows) == ends[-1]
    first = int(order.order_S[0]) // SHAPE.top_k
    assert torch.equal(rows[0], given.x_TH[first])


def test_what_is_right_is_measured_and_everything_else_is_named() -> None:
    def absent(shape, w):
        raise Absent("no module of this name")

    def broken(w, i):
        raise RuntimeError("a kernel that fails")

    said = events_of([
        contender("right", exact), contender("wrong", lambda w, i: i.x_TH), contender("fails", broken),
        Contender("absent", "dense", absent), contender("NaN", lambda w, i: i.x_TH * float("nan")),
        contender("unchecked", lambda w, i: None, "2:4", checked=False, work=PRODUCTS),
        contender("left out", exact),
    ], excluded=["left out"])  # fmt: skip
    assert named(said, "row") == ["right", "unchecked"] * 2
    assert sorted(set(named(said, "failed"))) == ["NaN", "fails", "wrong"]
    assert named(said, "absent") == ["absent"] and "left out" not in str(said)
    assert [e["tokens"] for e in said if e["event"] == "finished"] == [8, 1]
    row = next(e for e in said if e["event"] == "row")
    assert row["error"] < 1e-2 and row["graph"] and row["flops"] == 2 * 16 * SHAPE.elements


def test_what_no_graph_can_hold_is_timed_without() -> None:
    class Machine(DryMachine):
        def captured(self, call):
            raise RuntimeError("operation not permitted when stream is capturing")

    said = events_of([contender("right", exact)], (8,), machine=Machine())
    assert named(said, "no graph") == ["right"] == named(said, "row")
    assert next(e for e in said if e["event"] == "row")["graph"] is False


def test_a_broken_device_ends_the_worker() -> None:
    class Machine(DryMachine):
        def synchronize(self):
            raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(BrokenDevice):
        events_of([contender("breaks", exact)], machine=Machine())


def test_out_of_time() -> None:
    said: list[dict] = []
    Worker(DryMachine(), SHAPE, BF16, said.append, 0.0).run([contender("right", exact)], (8, 1))
    assert [e["tokens"] for e in said if e["event"] == "out of time"] == [8, 1]


def test_kernels_and_peers_without_a_device() -> None:
    """None of the others runs here, and each says so by its name."""
    others = [peer for peer in PEERS if not peer.name.startswith("torch.")]
    said = events_of([*contenders(), *others], (8,))
    silent = {c.name for c in (*contenders(), *others)} - set(named(said, "failed") + named(said, "absent"))
    assert silent == set(named(said, "row"))
    assert all(e["reason"] for e in said if e["event"] in ("failed", "absent"))


def rows() -> list[dict]:
    said = events_of([contender("peer", exact), contender("ours", exact, "75 %", ours=True)], (8,))
    found = [e for e in said if e["event"] == "row"]
    found[0]["ms"], found[1]["ms"] = 2.0, 0.5
    return found


def test_ratios_and_rates(tmp_path) -> None:
    """By hand: 2 ms of a peer over 0.5 ms; bytes and operations over time; tokens that fit beside two layers."""
    machine = {"memory": 10 * rows()[0]["weight_bytes"], "device": "A GPU"}
    found = with_ratios([with_rates(row, SHAPE, machine, (1e9, 1e12)) for row in rows()])
    peer, ours = found
    assert peer["ratio"] == 1 and ours["ratio"] == 4 and ours["best_dense"] == "peer"
    assert peer["tb_per_s"] == round(peer["bytes"] / 2e-3 / 1e12, 3)
    assert peer["roofline_share"] == round(max(peer["bytes"] / 1e9, peer["flops"] / 1e12) / 2e-3, 3)
    assert peer["largest_batch"] == int(8 * peer["weight_bytes"] / (peer["peak_bytes"] / 8))
    assert ours["largest_batch"] > peer["largest_batch"]
    console = Console(width=report.WIDTH, record=True)
    report.show(console, found, [{"event": "absent", "name": "DeepGEMM", "shape": "small", "reason": "[no] module"}])
    text = console.export_text()
    assert "4.00" in text and "DeepGEMM" in text and "[no] module" in text
    kept = json.loads(report.save({"machine": machine, "rows": found}, tmp_path).read_text())
    assert kept["rows"] == json.loads(json.dumps(found)) and next(tmp_path.iterdir()).name.startswith("gpu-a-gpu-")


def test_losses() -> None:
    """By hand; a point counts where both were timed, and nothing is lost where both take the same kernels."""
    base = {"shape": "small", "tokens": 8, "model_ms": 0.1}
    found = losses.losses([
        base | {"form": "75 %", "name": "75 %, cost model", "candidate": "mma 16", "ms": 0.6},
        base | {"form": "75 %", "name": "75 %, max-autotune", "candidate": "triton", "ms": 0.5, "model_ms": 0.2},
        base | {"form": "2:4", "name": "2:4, cost model", "candidate": "mma 16", "ms": 0.6},
        base | {"form": "dense", "name": "dense, cost model", "candidate": "triton", "ms": 0.6},
        base | {"form": "dense", "name": "dense, max-autotune", "candidate": "triton", "ms": 0.5},
        base | {"form": "dense", "name": "torch._grouped_mm", "ms": 0.1},
    ])  # fmt: skip
    assert [(row["form"], row["loss"]) for row in found] == [("75 %", 0.2), ("dense", 0.0)]
    assert found[0] == base | {
        "form": "75 %", "model": "mma 16", "measured": "triton", "ms": 0.6, "measured_ms": 0.5, "loss": 0.2,
    }  # fmt: skip
    console = Console(width=report.WIDTH, record=True)
    console.print(losses.table(found, report.WIDTH))
    text = console.export_text()
    assert "loses 20% at most, 10% in the middle" in text and "mma 16" in text


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not made for this machine")
def test_choices_in_the_interpreter(tmp_path) -> None:
    """Kernels of each form prove themselves and are timed, once as the model has it and once as was measured."""
    (tmp_path / "cache").mkdir(mode=0o700)
    words = ["--dry-run", "--choices", "--quick", "--tokens", "1", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words], cwd=ROOT, capture_output=True, text=True, timeout=500,
        env=os.environ | {"TRITON_INTERPRET": "1", "SAMOYEDS_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kept = json.loads(next(tmp_path.glob("gpu-*.json")).read_text())
    assert {row["form"] for row in kept["losses"]} == {weights.DENSE, *weights.PATTERNS}, kept["notes"]
    assert all(row["model"].startswith("triton") and row["model_ms"] > 0 for row in kept["losses"])
    assert len(kept["rows"]) == 8 and "the cost model loses" in done.stdout


def test_no_dense_peer() -> None:
    alone = with_ratios([row | {"ours": True} for row in rows()])
    assert all(row["ratio"] is None for row in alone) and all(row["work"] == BLOCK for row in alone)


# ---------------------------------------------------------------------------------------------------- supervision

SCRIPT = """
import json, sys, time
path, excluded, tokens = sys.argv[1], sys.argv[2].split(","), [int(t) for t in sys.argv[3].split(",")]
with open(path, "a", buffering=1) as stream:
    say = lambda **event: stream.write(json.dumps(event) + "\\n")
    for count in tokens:
        for name in ("good", "breaks", "hangs"):
            if name in excluded:
                continue
            say(event="trying", name=name, tokens=count)
            if name == "breaks" and count == 1:
                print("illegal memory access", file=sys.stderr)
                sys.exit(3)
            if name == "hangs" and count == 1:
                time.sleep(60)
            say(event="row", shape="small", tokens=count, name=name)
        say(event="finished", tokens=count)
"""


def test_a_worker_that_breaks_or_hangs_is_replaced(tmp_path) -> None:
    """What was finished stays; what broke or hung is named, and the rest is measured without it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def command(shape, path, seconds, excluded, tokens):
        return [sys.executable, str(script), str(path), ",".join(excluded), ",".join(map(str, tokens))]

    heard: list[dict] = []
    found = measure(SMALL[:1], 60, command, (8, 1, 4), silence=3.0, heard=heard.append)
    assert [(r["tokens"], r["name"]) for r in found.rows] == [
        (8, "good"), (8, "breaks"), (8, "hangs"), (1, "good"), (4, "good"),
    ]  # fmt: skip
    broke = {n["name"]: n["reason"] for n in found.notes if n["event"] == "broke"}
    assert "illegal memory access" in broke["breaks"] and "no word" in broke["hangs"] and len(broke) == 2
    assert len(heard) > len(found.rows)


HURRIED = """
import json, sys
path, tokens = sys.argv[1], [int(t) for t in sys.argv[2].split(",")]
with open(path, "a", buffering=1) as stream:
    for event in ({"event": "absent", "name": "peer", "reason": "no module", "tokens": None},
                  {"event": "row", "shape": sys.argv[3], "tokens": tokens[0], "name": "good"},
                  {"event": "finished", "tokens": tokens[0]},
                  *({"event": "out of time", "tokens": t} for t in tokens[1:])):
        stream.write(json.dumps(event) + "\\n")
"""


def test_what_there_was_no_time_for_comes_after_all_shapes(tmp_path) -> None:
    """A worker that measures one number of tokens: the second pass has the second one, and the third is named."""
    script = tmp_path / "script.py"
    script.write_text(HURRIED)

    def command(shape, path, seconds, excluded, tokens):
        return [sys.executable, str(script), str(path), ",".join(map(str, tokens)), shape.name]

    found = measure(SMALL, 60, command, (8, 1, 4), silence=20.0)
    assert [(r["shape"], r["tokens"]) for r in found.rows] == [("small", 8), ("ragged", 8), ("small", 1), ("ragged", 1)]
    late = [(n["shape"], n["tokens"]) for n in found.notes if n["event"] == "out of time"]
    assert late == [("small", 4), ("ragged", 4)]
    console = Console(width=report.WIDTH, record=True)
    report.show(console, [], found.notes)
    assert "peer no module (small, ragged)" in console.export_text()


def test_a_worker_that_cannot_start(tmp_path) -> None:
    found = measure(SMALL[:1], 30, lambda *_: [sys.executable, "-c", "raise SystemExit('no torch')"], (8,))
    assert found.rows == [] and "no torch" in found.notes[0]["reason"]
