"""The other process of `apart`: proves the kernels that it is asked about, and prints the answer."""

from __future__ import annotations

import json
import sys

import torch

from samoyeds_codegen.cuda.launch import run as launch_all
from samoyeds_codegen.gpu.prove import Run, prove
from samoyeds_codegen.triton.sample import Form
from samoyeds_codegen.triton.spec import ExpertsSpec


def answer(question: str, run: Run = launch_all) -> str:
    """JSON with the reason why not; empty if the kernels may be used."""
    asked = json.loads(question)
    major, minor = asked["capability"]
    reason = prove(
        ExpertsSpec.named(asked["spec"]), asked["kind"], Form(**asked["form"]), torch.device(asked["device"]),
        (major, minor), run,
    )  # fmt: skip
    return json.dumps({"reason": reason})


if __name__ == "__main__":
    print(answer(sys.argv[1]))
