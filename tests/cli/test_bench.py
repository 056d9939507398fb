"""``samoyeds bench`` and ``samoyeds convert``."""

import json

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from samoyeds_compile.sparsity import load_sparse_
from samoyeds_compile.sparsity.tensor import PackedTensor
from tests.cli.run import run

SCRIPT = """
import torch
from tests.blocks import Block


def block():
    return Block(), torch.randn(6, 16)


def plain():
    return torch.nn.Linear(4, 4), torch.ones(2, 4)
"""
SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.inductor
@pytest.mark.parametrize("function, rewritten", [("block", 1), ("plain", 0)])
def test_bench(tmp_path, function, rewritten):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run("bench", f"{tmp_path / 'script.py'}:{function}", "--rounds", 3, "--json")
    assert done.exit_code == (0 if rewritten else 1), done.output
    result = json.loads(done.stdout)
    assert result["milliseconds"].keys() == {"eager", "inductor", "samoyeds"}
    assert result["blocks_rewritten"] == rewritten and all(d < 1e-5 for d in result["deviation"].values())


def test_bench_of_a_dtype_that_is_none(tmp_path):
    done = run("bench", "config.json", "--dtype", "int4")
    assert done.exit_code == 2 and "fp32, bf16, fp16" in done.stderr


def test_convert(tmp_path):
    """The file loads into a model of the same configuration, which then computes what the packed one does."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_key_value_heads=2, **SIZES)).eval()
    model.save_pretrained(tmp_path / "dense")
    done = run("convert", tmp_path / "dense", tmp_path / "packed", "--quiet", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["bytes_after"] < report["bytes_before"] / 3 and report["config"]["m"] == 2
    assert sum(report["file_bytes"].values()) == sum(path.stat().st_size for path in (tmp_path / "packed").iterdir())
    load_sparse_(model, tmp_path / "packed")
    experts = model.model.layers[0].mlp.experts
    assert all(isinstance(p.data, PackedTensor) for p in experts.parameters())
    kept = experts.gate_up_proj.to_dense()
    assert 0.2 < (kept != 0).float().mean() <= 0.25
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("nowhere", "out"), "is no configuration"),
        (("nowhere", "out", "--pattern", "2:4"), "give n:m:vector"),
        ((None, "out"), "has neither model.safetensors nor"),
    ],
)
def test_convert_of_nothing(arguments, problem, tmp_path):
    MixtralConfig(**SIZES).save_pretrained(tmp_path)
    checkpoint, *others = arguments
    done = run("convert", checkpoint or tmp_path, *others)
    assert done.exit_code == 2 and problem in done.stderr.replace("\n", " ")
