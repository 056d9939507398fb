"""Listing or naming the backend costs next to nothing: the heavy parts wait for the first compilation."""

import json
import subprocess
import sys

import torch._dynamo

HEAVY = (
    "triton",
    "torch._inductor.compile_fx",
    "transformers",
    "accelerate",
    "networkx",
    "sympy",
    "matplotlib",
    "jinja2",
    "rich",
    "typer",
)

# What `import torch` itself loads is torch's affair; only what comes on top of it counts.
SCRIPT = """
import json, sys
import torch
before, started = set(sys.modules), []
heads = ("subprocess.Popen", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system")
sys.addaudithook(lambda event, args: started.append(event) if event.startswith(heads) else None)
import samoyeds_compile.backend
print(json.dumps({"loaded": sorted(set(sys.modules) - before), "started": started}))
"""


def test_backend_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert "samoyeds_compile.backend" in seen["loaded"]
    assert [m for m in HEAVY if m in seen["loaded"]] == []
    assert seen["started"] == []


def test_backend_is_listed() -> None:
    assert "samoyeds" in torch._dynamo.list_backends()
