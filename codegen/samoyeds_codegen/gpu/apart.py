"""The proof of CUDA kernels in a process of its own, as a kernel that hangs or breaks the device would take ours along.

Answers are kept in the user's cache, by the text of all kernels, the device and its driver: a machine asks once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from samoyeds_codegen.build import cache_directory
from samoyeds_codegen.cuda.emit import emit
from samoyeds_codegen.errors import KernelError
from samoyeds_codegen.files import write_whole
from samoyeds_codegen.gpu.candidate import candidates
from samoyeds_codegen.gpu.candidate import projection as cuda_spec
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec

SECONDS = 120
"""After this long a proof is taken to hang."""
MOMENTARY = "the kernels do not run"
"""Reasons that begin so may be gone the next time, as where memory was short; they are not kept."""
Ask = Callable[[str], str]
"""Gives the answer to a question, both as JSON."""


def proven_apart(
    spec: ExpertsSpec, kind: str, form: Form, device: torch.device, numbers: Device, ask: Ask | None = None
) -> str:
    """As `prove`, in another process.

    Args:
        spec, kind, form, device: as `prove` takes them.
        numbers: what the device is.
        ask: asks the other process.
    """
    if not candidates(spec, (kind,), numbers.capability):
        return "there is no such kernel for this block and device"
    question = json.dumps({
        "spec": spec.name, "kind": kind, "form": asdict(form), "device": str(device), "capability": numbers.capability,
    })  # fmt: skip
    try:
        where = _file(spec, kind, form, numbers)
        if where.exists():
            return str(json.loads(where.read_text())["reason"])
        reason = str(json.loads((ask or _ask)(question))["reason"])
        if not reason.startswith(MOMENTARY):
            write_whole(where, json.dumps({"reason": reason}))
    except (KernelError, OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return reason


def _file(spec: ExpertsSpec, kind: str, form: Form, numbers: Device) -> Path:
    """Where the answer is kept."""
    found = candidates(spec, (kind,), numbers.capability)
    kernels = [
        cuda_spec(spec, op, kind, c.slots, numbers.capability, form.bias) for c in found for op in ("up", "down")
    ]
    texts = "\0".join(map(emit, kernels))
    key = f"{texts}\0{form}\0{numbers.name}\0{torch.version.cuda}\0{_driver()}"
    return cache_directory("devices") / f"proof-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@functools.cache
def _driver() -> str:
    """The version of the driver, where it says so."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text() if path.exists() else ""


def _ask(question: str) -> str:
    """In a process of this interpreter."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "samoyeds_codegen.gpu.answer", question]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return json.dumps({"reason": f"the kernels hang: no answer in {SECONDS} s"})
    if done.returncode:
        return json.dumps({"reason": f"the proof ended with status {done.returncode}: {done.stderr.strip()[-300:]}"})
    return done.stdout.strip().splitlines()[-1]
