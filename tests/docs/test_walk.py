"""A newcomer's walk: from a model that is half rewritten to one that is, by nothing but what the tools print."""

import json
import re

from tests.cli.run import run

SCRIPT = """
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import samoyeds_compile.integrations.transformers
from tests.blocks import Block


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
        self.front = Block(hidden=64)
        self.model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, **sizes))
        self.model.set_experts_implementation("eager")

    def forward(self, x):
        return self.model(inputs_embeds=self.front(x)[None], use_cache=False).logits


def model_and_inputs():
    model = Half().eval()
    {advice}
    return model, torch.randn(8, 64)
"""


def test_walk(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(advice="pass"))
    first = run("explain", f"{script}:model_and_inputs", "--json")
    assert first.exit_code == 1, "the exit code says that something is left to do"
    report = json.loads(first.stdout)
    blocks = [block for graph in report["graphs"] for block in graph["blocks"]] + report["uncaptured"]
    left = [block for block in blocks if not block["rewritten"]]
    assert len(blocks) - len(left) == 1 and [block["module"] for block in left] == ["model.model.layers.0.mlp.experts"]
    assert all("modeling_mixtral.py" in block["source"] for block in left), "the line to look at"

    call = re.search(r"call (samoyeds_compile[\w.]+\(model\))", left[0]["remedy"])
    assert call is not None, left[0]["remedy"]
    script.write_text(SCRIPT.format(advice=call[1]))
    second = run("explain", f"{script}:model_and_inputs")
    assert second.exit_code == 0, second.stdout
    assert "2 of 2 MoE blocks rewritten" in second.stdout
