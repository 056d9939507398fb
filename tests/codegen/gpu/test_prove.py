"""CUDA kernels prove themselves, the emulator in place of a device; and what becomes of the answer."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from samoyeds_codegen.cuda.emit import emit
from samoyeds_codegen.cuda.spec import VARIANTS
from samoyeds_codegen.gpu import apart, candidate
from samoyeds_codegen.gpu.answer import answer
from samoyeds_codegen.gpu.apart import proven_apart
from samoyeds_codegen.gpu.candidate import KINDS
from samoyeds_codegen.gpu.cost import Block
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.gpu.prove import prove
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec, Pattern
from samoyeds_compile.lower import gpu as lower
from tests.codegen.cuda import emulated

SPEC = ExpertsSpec("bfloat16", Pattern(1, 2, 64), "silu(gate) * up", True)
CPU = torch.device("cpu")
SHARING_TOKENS = ("token_pairs", "register_pairs")
A100 = Device("A100", (8, 0), 108, 1.41e9, 2.0e12)


@pytest.fixture(autouse=True)
def one_tile(monkeypatch):
    """Of each kind, as emulation takes seconds."""
    tokens = {"mma": (16,), "wgmma": (16,), **dict.fromkeys(("pairs", "registers", *SHARING_TOKENS), (32,))}
    monkeypatch.setattr(candidate, "TOKENS", tokens)
    candidate.candidates.cache_clear()
    yield
    candidate.candidates.cache_clear()


def running(right="", wrong=""):
    def run(launches, device):
        for launch in launches:
            emulated.run(launch, text=emit(launch.spec).replace(right, wrong) if right else "")

    return run


@pytest.mark.parametrize("pattern", [Pattern(1, 2, 64), Pattern(1, 2, 128, 64)], ids=str)
@pytest.mark.parametrize(("kind", "capability"), [("mma", (8, 0)), *((kind, (9, 0)) for kind in VARIANTS)])
def test_right_kernels_are_proven(kind, capability, pattern) -> None:
    spec = replace(SPEC, pattern=pattern)
    assert prove(spec, kind, Form(aligned=False, bias=True), CPU, capability, running()) == ""


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        ("activate(gate.row[d], up.row[d])", "activate(up.row[d], gate.row[d])", "times the error"),
        ("if (token >= tile.count) continue;", "", "nobody|times the error|do not run"),
        ("sum[i] += weight", "sum[i] += 2 * weight", "weighted sum"),
        ("ptx::cp_async_wait<STAGES - 2>();", "", "InFlightError"),
    ],
)
def test_wrong_kernels_are_refused(right, wrong, reason) -> None:
    found = prove(SPEC, "mma", Form(), CPU, (8, 0), running(right, wrong))
    assert any(word in found for word in reason.split("|")), found


def test_rows_of_the_second_block_count() -> None:
    wrong = running("first + int(rank()) * CONSUMERS", "first + int(rank())")
    assert prove(SPEC, "token_pairs", Form(), CPU, (9, 0), wrong)


def test_kinds_are_proven_at_a_time(monkeypatch) -> None:
    """Each in a process of its own, so a machine waits for the slowest one only."""
    together = threading.Barrier(len(KINDS) - 1, timeout=60)

    def proof(spec, kind, *rest) -> str:
        together.wait()
        return "" if kind == "mma" else f"no {kind}"

    monkeypatch.setattr(lower, "proven_apart", proof)
    monkeypatch.setattr(lower, "device_of", lambda device: A100)
    monkeypatch.setattr(lower, "_triton_refusal", lambda *operands: "no triton")
    arguments = (SPEC, Form(), Block(8, 64, 64), torch.zeros(4, 2, dtype=torch.int64), torch.device("cuda"), False)
    kinds, refused = lower.usable(*arguments)
    assert kinds == ["mma"] and refused == {kind: "" if kind == "mma" else f"no {kind}" for kind in KINDS}
    kinds, refused = lower.usable(*arguments, trains=True)
    assert kinds == [] and refused["mma"] == "their gradients are Triton kernels: no triton"


def test_no_kernel() -> None:
    assert "no such kernel" in prove(SPEC, "wgmma", Form(), CPU, (8, 0), running())
    assert "no such kernel" in proven_apart(SPEC, "wgmma", Form(), CPU, A100)


class Asked:
    def __init__(self, reason: str) -> None:
        self.reason, self.questions = reason, []

    def __call__(self, question: str) -> str:
        self.questions.append(json.loads(question))
        return json.dumps({"reason": self.reason})


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMOYEDS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)


@pytest.mark.parametrize(
    ("reason", "kept"), [("", True), ("3 times the error", True), ("the kernels do not run", False)]
)
def test_answers_are_kept(own_cache, reason, kept) -> None:
    """But for those that another moment may give another one to."""
    asked = Asked(reason)
    for _ in range(2):
        assert proven_apart(SPEC, "mma", Form(), CPU, A100, asked) == reason
    assert len(asked.questions) == (1 if kept else 2)
    assert proven_apart(SPEC, "mma", Form(bias=True), CPU, A100, asked) == reason
    assert asked.questions[-1]["form"]["bias"] and asked.questions[-1]["capability"] == [8, 0]


def test_an_answer_that_makes_no_sense(own_cache) -> None:
    for said in ("", "nonsense", "{}"):
        assert "Error" in proven_apart(SPEC, "mma", Form(), CPU, A100, lambda question, said=said: said)


def test_the_other_process_answers_and_may_hang(own_cache, monkeypatch) -> None:
    """There is no CUDA driver here, and the process says so; one that says nothing is not waited for."""
    assert "do not run" in proven_apart(SPEC, "mma", Form(), CPU, A100)
    monkeypatch.setattr(apart, "SECONDS", 0.01)
    assert "hang" in proven_apart(SPEC, "mma", Form(), CPU, A100)


def test_question_and_answer_fit(own_cache) -> None:
    question = []
    proven_apart(SPEC, "mma", Form(), CPU, A100, lambda asked: question.append(asked) or '{"reason": ""}')
    launched = []
    assert (
        "times the error"
        in json.loads(answer(question[0], lambda launches, device: launched.extend(launches)))["reason"]
    )
    assert launched
