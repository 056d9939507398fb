"""The wheel holds all that `torch.compile(model, backend="samoyeds")` needs, with no checkout in sight."""

import configparser
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Imports nothing of ours on purpose: the entry point alone has to lead torch.compile to the backend.
SCRIPT = """
import importlib.metadata
import sys
import torch
from torch import nn


class Moe(nn.Module):
    def __init__(self, hidden=16, inner=32, experts=4, top_k=2):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * 0.2)

    def forward(self, x):
        weight, expert = self.router(x).softmax(-1).topk(self.top_k, -1)
        weight, expert = weight.reshape(-1), expert.reshape(-1)
        rows = x.repeat_interleave(self.top_k, dim=0)
        gate, up = torch.bmm(self.gate_up[expert], rows.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
        inner = nn.functional.silu(gate) * up
        out = torch.bmm(self.down[expert], inner.unsqueeze(-1)).squeeze(-1) * weight.unsqueeze(-1)
        return out.view(x.shape[0], self.top_k, x.shape[1]).sum(dim=1)


torch.manual_seed(0)
model, x, graphs = Moe().eval(), torch.randn(5, 16), []
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model, backend="samoyeds")(x), model(x))
    # A step that fails falls back to the original graph, so equal results alone do not show a broken wheel.
    torch._dynamo.reset()
    options = {"base": "eager", "report": graphs.append}
    torch.testing.assert_close(torch.compile(model, backend="samoyeds", options=options)(x), model(x))
assert [(b.rewritten, b.reason) for g in graphs for b in g.blocks] == [(True, None)], graphs
package = sys.modules["samoyeds_compile"]
assert importlib.metadata.version("samoyeds-compile") == package.__version__
print(package.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True)
    wheels = list(out.iterdir())
    assert len(wheels) == 1, wheels
    return wheels[0]


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
        parsed = configparser.ConfigParser()
        parsed.read_string(archive.read(entry_points).decode())
    assert parsed["torch_dynamo_backends"]["samoyeds"] == "samoyeds_compile.backend:samoyeds"
    for package, where in (("samoyeds_compile", ROOT), ("samoyeds_codegen", ROOT / "codegen")):
        assert f"{package}/py.typed" in names
        sources = {p.relative_to(where).as_posix() for p in (where / package).rglob("*.py")}
        assert sources <= names, f"left out of the wheel: {sorted(sources - names)}"
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"samoyeds_compile", "samoyeds_codegen"}


@pytest.mark.inductor
def test_installed_wheel_compiles(wheel: Path, tmp_path: Path) -> None:
    # A new environment that borrows torch from this one. The .pth line makes our dependencies importable,
    # but .pth files inside the borrowed folder, and so the editable install of the checkout, stay unread.
    target = tmp_path / "venv"
    venv.create(target, with_pip=False, symlinks=True)
    python = target / "bin" / "python"
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")

    script = tmp_path / "use.py"
    script.write_text(SCRIPT)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(site), done.stdout
