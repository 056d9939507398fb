"""Explain, the table, JSON, the dump folder."""

import copy
import json
import runpy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import samoyeds_compile
from samoyeds_codegen import build
from samoyeds_compile import Report
from tests.blocks import Block
from tests.models import families


def mixtral():
    (entry,) = [e for e in families.decorated_experts_classes() if e.id == "mixtral"]
    model = families.build(entry)
    return model, families.inputs(entry, model)


def test_explain_a_rewritten_model():
    model, inputs = mixtral()
    model.set_experts_implementation("grouped_mm")
    state = torch.get_rng_state()
    report = samoyeds_compile.explain(model, **inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [b.module for b in report.blocks] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    block = report.blocks[0]
    assert (block.rewritten, block.reason, block.experts, block.top_k) == (
        True,
        None,
        model.config.num_local_experts,
        2,
    )
    assert (block.hidden_size, block.intermediate_size) == (64, model.config.intermediate_size)
    assert (block.activation, block.weight_layout, block.gate_up_layout) == ("swiglu", "out_in", "concatenated")
    assert block.parameters[0] == "model.layers.0.mlp.experts.gate_up_proj"
    assert "moe.py" in block.source
    assert block.deviation is not None and block.deviation < 1e-4
    assert [s.name for s in report.graphs[0].steps] == ["normalize", "match", "validate", "rewrite", "layouts", "lower"]
    assert "2 of 2 MoE blocks rewritten in 1 graph(s)" in str(report)


def test_explain_names_break_and_remedy_of_eager_experts():
    model, inputs = mixtral()
    model.set_experts_implementation("eager")
    report = samoyeds_compile.explain(model, **inputs)
    assert [b.rewritten for b in report.blocks] == [False, False]
    enable = "samoyeds_compile.integrations.transformers.enable(model)"
    assert all(enable in b.reason and 'set_experts_implementation("grouped_mm")' in b.reason for b in report.blocks)
    ((reason, remedy),) = report.breaks
    assert "nonzero" in reason and "modeling_mixtral.py" in reason
    assert enable in remedy
    assert "Graph breaks" in str(report)


def test_explain_unmatched_experts():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    report = samoyeds_compile.explain(Loop(), torch.randn(2, 8))
    (block,) = report.blocks
    assert (block.module, block.rewritten, block.experts) == ("experts", False, 4)
    assert "no surface pattern" in block.reason


def test_explain_a_model_without_experts():
    report = samoyeds_compile.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert report.blocks == [] and len(report.graphs) == 1
    assert "no MoE block found" in str(report)


def test_explain_takes_a_compiled_model():
    model = torch.compile(Block(), backend="eager")
    assert samoyeds_compile.explain(model, torch.randn(3, 16)).blocks[0].rewritten


def test_near_miss_says_why_and_where():
    class TwoSorts(Block):
        def grouped(self, x, ids, weights):
            return super().grouped(x, ids, weights.flip(0)) + super().grouped(
                x, ids.sort(-1, descending=True)[0], weights
            )

    model = Block(activate=lambda z: z.chunk(2, -1)[0].cumsum(0))
    report = samoyeds_compile.explain(model, torch.randn(3, 16))
    (block,) = report.blocks
    assert block.reason == "cumsum is not known to treat every row on its own"
    assert "cumsum(0)" in block.reason_source and "test_report.py" in block.reason_source
    assert block.reason in str(report).replace("\n", " ").replace("│", " ").replace("  ", " ") or block.reason


def test_a_copied_report_still_collects():
    report = Report()
    copy.deepcopy({"report": report})["report"](samoyeds_compile.GraphReport("0/0"))
    assert len(report.graphs) == 1


def test_json_round_trip():
    report = samoyeds_compile.explain(Block(), torch.randn(3, 16))
    data = json.loads(report.to_json())
    assert data["version"] == 1
    assert data["graphs"][0]["blocks"][0]["family"] == "grouped"


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("style", ["grouped", "gathered"])
def test_dumped_programs_run_and_agree(tmp_path, capsys, style, train):
    options = {"base": "eager", "dump": str(tmp_path)}
    with torch.set_grad_enabled(train):
        torch.compile(Block(style), backend="samoyeds", options=options)(torch.randn(6, 16))
    folder = tmp_path / "graph_000"
    routers = [] if train else ["after_routers.py"]  # in inference they become one op
    kernels = [] if style == "gathered" and not train else ["kernels"]  # gathered weights of six tokens need none
    graphs = ["after_lower.py", "after_rewrite.py", *routers, "before.py"]
    programs = [*graphs, "blocks", "graph.json", *kernels, "view.json"]
    assert sorted(p.name for p in folder.iterdir()) == programs
    assert "samoyeds.moe_experts" in (folder / "after_rewrite.py").read_text()
    stage = "expert_up" if train else "experts_gathered" if style == "gathered" else "experts_dense"  # six tokens
    assert f"samoyeds.{stage}" in (folder / "after_lower.py").read_text()
    for name in ("before", "after_rewrite", "after_lower"):
        runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
        assert ("equal to before.py" in capsys.readouterr().out) == (name != "before")


def test_dump_has_the_text_of_kernels(tmp_path):
    """Of each kernel once, as the cache has it."""
    report = Report()
    options = {"base": "eager", "dump": tmp_path, "report": report}
    with torch.no_grad():
        torch.compile(Block("grouped"), backend="samoyeds", options=options)(torch.randn(6, 16))
    (kernel,) = (tmp_path / "graph_000" / "kernels").glob("*.cpp")
    text = kernel.read_text()
    assert text.startswith("// Samoyeds experts: float32 ") and kernel.name.startswith("dense_float32_")
    assert any(text == path.read_text() for path in build.cache_directory().glob("*/kernel.cpp"))


def test_dump_of_a_dynamic_checkpointed_model_runs(tmp_path):
    model, inputs = mixtral()
    model.set_experts_implementation("grouped_mm")
    model.train().gradient_checkpointing_enable()
    compiled = torch.compile(model, backend="samoyeds", options={"base": "eager", "dump": str(tmp_path)}, dynamic=True)
    compiled(**inputs)
    runpy.run_path(str(tmp_path / "graph_000" / "after_lower.py"), run_name="__main__")


def test_dump_numbers_graphs_and_gathers_them(tmp_path):
    for style in ("grouped", "gathered"):
        options = {"base": "eager", "dump": tmp_path}
        torch.compile(Block(style), backend="samoyeds", options=options)(torch.randn(6, 16))
    gathered = json.loads((tmp_path / "report.json").read_text())
    assert [g["blocks"][0]["family"] for g in gathered["graphs"]] == ["grouped", "gathered"]
    assert [g["dump"][-9:] for g in gathered["graphs"]] == ["graph_000", "graph_001"]


def test_a_dump_folder_that_cannot_be_made_names_itself(tmp_path):
    (tmp_path / "file").write_text("")
    options = {"base": "eager", "dump": tmp_path / "file" / "below"}
    with pytest.raises(Exception, match=r"option 'dump' is .*give a folder"):
        torch.compile(Block(), backend="samoyeds", options=options)(torch.randn(6, 16))


def test_environment_switches_the_dump_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMOYEDS_DUMP", str(tmp_path))
    monkeypatch.setenv("SAMOYEDS_BASE", "eager")
    report = Report()
    torch.compile(Block(), backend="samoyeds", options={"report": report})(torch.randn(6, 16))
    assert report.graphs[0].dump == str(tmp_path / "graph_000")


def test_dump_of_symbolic_sizes_runs(tmp_path):
    """A dynamic graph with a cache calls functions of `operator` on sizes; their names must be imported."""
    model, inputs = mixtral()
    model.set_experts_implementation("grouped_mm")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        cache.reset()
        options = {"base": "eager", "dump": tmp_path}
        torch.compile(model, backend="samoyeds", options=options, dynamic=True)(**inputs, past_key_values=cache)
    program = tmp_path / "graph_000" / "before.py"
    result = subprocess.run([sys.executable, str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
