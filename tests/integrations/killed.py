"""A loop that writes a checkpoint after each step and may be killed in the middle of one.

    python -m tests.integrations.killed FOLDER STEPS [STEP AT WHICH IT KILLS ITSELF]

One block learns under masks (SR-STE), the experts of the other are packed and frozen. Goes on where FOLDER stands.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samoyeds_compile import Report, SparsityConfig
from samoyeds_compile.sparsity import PackedTensor, best_mask
from samoyeds_compile.sparsity.training import SparseTraining, make_trainable_
from tests.integrations.test_training_loops import LanguageModel, batch, loss_of

CONFIG = SparsityConfig(1, 2, 16)
MASKED = ["blocks.0.gate_up", "blocks.0.down"]


def prepared() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel()
    for name in ("gate_up", "down"):
        weight = getattr(model.blocks[1], name).detach()
        mask = torch.stack([best_mask(matrix.abs(), CONFIG) for matrix in weight])
        packed = PackedTensor.from_dense(torch.where(mask, weight, 0), CONFIG)
        setattr(model.blocks[1], name, nn.Parameter(packed, requires_grad=False))
    make_trainable_(model, MASKED, CONFIG)
    return model


def train(folder: Path, steps: int, killed_at: int | None = None) -> dict[str, Tensor]:
    """The state of the model after ``steps`` steps, from wherever the folder stands."""
    model, training, report = prepared(), SparseTraining(CONFIG, method="sr_ste", decay=1e-2), Report()
    training.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    parts: tuple[Any, ...] = (model, optimizer, training)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        for part, state in zip(parts, torch.load(checkpoint, weights_only=False), strict=True):
            part.load_state_dict(state)
    forward = torch.compile(model, backend="samoyeds", options={"base": "aot_eager", "report": report})
    while training.steps < steps:
        loss_of(forward, batch(training.steps)).backward()
        training.before_step()
        if training.steps == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        training.step()
        optimizer.zero_grad()
        torch.save([part.state_dict() for part in parts], folder / "next.pt")
        os.replace(folder / "next.pt", checkpoint)  # a kill while writing leaves the last one whole
    assert len(report.rewritten) == len(report.blocks) == 2
    return model.state_dict()


if __name__ == "__main__":
    train(Path(sys.argv[1]), *map(int, sys.argv[2:]))
