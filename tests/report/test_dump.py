"""The dump folder: every file of it runs, it is bounded, and processes share it."""

import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from samoyeds_compile import Report, repro
from samoyeds_compile.report import files
from tests.blocks import Block
from tests.models import families

DEMO = ("mixtral", "qwen3_moe", "deepseek_v3")


def dumped(model, inputs, folder, **more):
    """The report of a model compiled with a dump."""
    torch._dynamo.reset()
    report = Report()
    options = {"base": "eager", "dump": folder, "report": report, **more}
    with torch.no_grad():
        torch.compile(model, backend="samoyeds", options=options)(**inputs)
    return report


def dumped_demo(name, folder, **options):
    """The report of one of the demo models, of which nothing was left out."""
    (entry,) = [e for e in families.decorated_experts_classes() if e.id == name]
    model = families.build(entry)
    model.set_experts_implementation("grouped_mm")
    report = dumped(model, families.inputs(entry, model), folder, **options)
    assert report.rewritten and not report.graphs[0].left_out
    return report


@pytest.mark.parametrize("name", DEMO)
def test_every_program_of_the_demo_models_runs(name, tmp_path, capsys):
    dumped_demo(name, tmp_path)
    check_programs(tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO)
def test_every_program_of_the_demo_models_runs_alone(name, tmp_path):
    """In processes of their own, started elsewhere: nothing that this one imported or set helps them."""
    report = dumped_demo(name, tmp_path / "dumped", record_routing=True)
    programs = programs_of(tmp_path / "dumped")
    edited = {"rewrite", "routers", "routing", "lower"} & {step.name for step in report.graphs[0].steps}
    assert {f"after_{step}.py" for step in edited} < {program.name for program in programs}
    replays = [
        ["-m", "samoyeds_compile.repro", str(program.parents[2]), program.parent.name, "--seeds", "1"]
        for program in programs
        if program.name == "block.py"
    ]
    assert replays
    for arguments in [*([str(program)] for program in programs), *replays]:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        assert ("equal" in done.stdout) == (Path(arguments[0]).name != "before.py"), arguments


def check_programs(folder, capsys):
    """Each file runs and agrees with ``before.py``, alone and by the command that replays a block."""
    for program in programs_of(folder):
        capsys.readouterr()
        runpy.run_path(str(program), run_name="__main__")
        assert ("equal" in capsys.readouterr().out) == (program.name != "before.py"), program
    for program in folder.glob("graph_*/blocks/*/block.py"):
        assert repro.main([str(program.parents[2]), program.parent.name, "--seeds", "1"]) == 0, program


def programs_of(folder):
    """Every Python file of a dump folder."""
    programs = sorted(folder.glob("graph_*/**/*.py"))
    assert {p.name for p in programs} >= {"before.py", "after_rewrite.py", "after_lower.py", "block.py"}
    return programs


def test_kernels_come_with_their_logs(tmp_path):
    dumped(Block(), {"x": torch.randn(64, 16)}, tmp_path)
    (text,), (log,) = (sorted(tmp_path.glob(f"graph_000/kernels/*{suffix}")) for suffix in (".cpp", ".log"))
    assert text.stem == log.stem and "kernel.cpp" in log.read_text().splitlines()[1]
    assert log.name in (tmp_path / "report.html").read_text()


def test_programs_notice_another_result(tmp_path):
    dumped(Block(), {"x": torch.randn(6, 16)}, tmp_path)
    program = tmp_path / "graph_000" / "after_rewrite.py"
    text = program.read_text()
    assert text.count("'concatenated'") == 1
    program.write_text(text.replace("'concatenated'", "'interleaved'"))
    with pytest.raises(AssertionError, match="of the largest value"):
        runpy.run_path(str(program), run_name="__main__")


def test_what_is_too_large_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_FILE", 3000)
    (graph,) = dumped(Block(), {"x": torch.randn(6, 16)}, tmp_path).graphs
    assert any(text.startswith("before.py: ") for text in graph.left_out)
    assert not (tmp_path / "graph_000" / "before.py").exists()
    assert "before.py" in (tmp_path / "report.json").read_text() and (tmp_path / "report.html").exists()


def test_full_folder_takes_reports_only(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_FOLDER", 0)
    (tmp_path / "something").write_text("in it")
    (graph,) = dumped(Block(), {"x": torch.randn(6, 16)}, tmp_path).graphs
    assert [p.name for p in (tmp_path / "graph_000").iterdir()] == ["graph.json"]
    (text,) = graph.left_out
    assert "the folder holds over" in text


def test_nobody_gets_the_same_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(lambda _: files.fresh_folder(tmp_path), range(64))]
    assert len(set(folders)) == 64


def test_a_file_is_whole_or_not_there(tmp_path):
    """A reader sees one of the texts that were written, and no temporary file stays."""
    texts = [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(files.write, tmp_path / "file", text) for text in texts for _ in range(8)]
        while not all(future.done() for future in done):
            if (tmp_path / "file").exists():
                assert (tmp_path / "file").read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
