"""``samoyeds explain`` on configurations and on scripts."""

import json
from pathlib import Path

import jsonschema
import pytest

from samoyeds_compile.report.schema import report_schema
from tests.cli.run import run

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 9}
MIXTRAL = {"model_type": "mixtral", **SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
SCRIPT = """
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

def model():
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    made = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, **sizes))
    return made, {"input_ids": torch.zeros(1, 8, dtype=torch.long)}

def loop():
    made, inputs = model()
    made.set_experts_implementation("eager")
    return made, inputs

def plain():
    return nn.Linear(4, 4), torch.ones(2, 4)

def nothing():
    return nn.Linear(4, 4)
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    return path


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_dump_has_what_explain_says(script: Path, tmp_path: Path) -> None:
    """Blocks that reached no graph, and breaks, too."""
    done = run("explain", f"{script}:loop", "--dump", tmp_path / "dumped", "--why")
    assert done.exit_code == 1 and "do      " in done.stdout
    report = json.loads((tmp_path / "dumped" / "report.json").read_text())
    jsonschema.validate(report, report_schema())
    assert report["uncaptured"] and report["breaks"]
    assert "enable(model)" in (tmp_path / "dumped" / "report.html").read_text()


def test_configuration(config: Path) -> None:
    """Weights are not needed; some layers stand for all."""
    done = run("explain", config)
    assert done.exit_code == 0, done.stderr
    assert "4 of 4 MoE blocks rewritten" in done.stdout and "not validated" in done.stdout


def test_json_has_the_schema(config: Path) -> None:
    done = run("explain", config, "--json", "--layers", 2, "--training")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    jsonschema.validate(report, report_schema())
    assert [block["experts"] for block in report["graphs"][0]["blocks"]] == [4, 4]


def test_folder_with_a_configuration(config: Path) -> None:
    assert run("explain", config.parent, "--layers", 1).exit_code == 0


def test_script(script: Path) -> None:
    done = run("explain", f"{script}:model")
    assert done.exit_code == 0 and "1 of 1 MoE blocks rewritten" in done.stdout


def test_blocks_left_alone_are_told_and_give_another_exit_code(script: Path) -> None:
    done = run("explain", f"{script}:loop")
    assert done.exit_code == 1 and "0 of 1 MoE blocks rewritten" in done.stdout and "enable(model)" in done.stdout


def test_model_without_experts(script: Path) -> None:
    done = run("explain", f"{script}:plain")
    assert done.exit_code == 0 and "no MoE block found" in done.stdout


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nowhere.py:model", "is no Python file"),
        ("script.py:missing", "has no function missing"),
        ("script.py:nothing", "return (model, inputs)"),
        ("no/such-model", "is no configuration"),
        ("wrong.json", "is no configuration"),
        ("unknown.json", "is no configuration"),
    ],
)
def test_bad_targets(script: Path, target: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(script.parent)
    Path("wrong.json").write_text("{")
    Path("unknown.json").write_text('{"model_type": "of the future"}')
    done = run("explain", target)
    assert done.exit_code == 2 and reason in done.stderr and done.stdout == ""
