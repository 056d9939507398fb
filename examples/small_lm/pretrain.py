"""Pre-train a small MoE language model dense, make it 75 % sparse with SR-STE, pack it, and serve it compiled.

    python -m examples.small_lm.pretrain [--dense 400] [--sparse 200] [--out FOLDER]

Both phases run in transformers' Trainer, compiled with ``model.compile(backend="samoyeds")``; two to three minutes of
one core. FOLDER then has the packed checkpoint, ``loss.json`` and ``loss.png``. The exit status is 1 if a block was not
rewritten, or if the packed model, reloaded and compiled, does not have the loss that the trained one had.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from samoyeds_compile import Report, SparsityConfig, load_sparse_, save_sparse, sparsify_
from samoyeds_compile.sparsity.training import SparseTraining, SparseTrainingCallback

from . import corpus
from . import model as small

CONFIG = SparsityConfig(1, 2, 32)
BATCH, LENGTH = 8, 128
EVERY = 16
"""One text of so many is read, which is plenty for this few steps."""
TOLERANCE = 1e-3
"""Largest relative difference of the held-out loss: trained, against packed, reloaded and compiled."""
Curve = list[float]


def examples(stream_N: Tensor, count: int, seed: int) -> list[dict[str, Tensor]]:
    """Random windows of the text, each one training example."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(stream_N) - LENGTH, (count,), generator=generator).tolist()
    cuts = [stream_N[start : start + LENGTH] for start in starts]
    return [{"input_ids": cut, "labels": cut} for cut in cuts]


def train(
    model: nn.Module, stream_N: Tensor, steps: int, rate: float, callbacks: Sequence[TrainerCallback] = ()
) -> Curve:
    """Losses of a phase, one for each step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate, warmup_steps=10,
            lr_scheduler_type="cosine", weight_decay=0.1, logging_steps=1, report_to=[], save_strategy="no",
        )  # fmt: skip
        data = examples(stream_N, steps * BATCH, seed=steps)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sparse_phase(model: nn.Module, stream_N: Tensor, steps: int) -> Curve:
    """Masks on the experts, which follow the weights for the first half of the steps, then stay and are baked in."""
    sparsify_(model, CONFIG, method="magnitude", trainable=True, progress=False)
    training = SparseTraining(CONFIG, method="sr_ste", refresh_every=5, stop_refresh_at=steps // 2)
    return train(model, stream_N, steps, 1e-3, [SparseTrainingCallback(training)])


def loss_of(model: nn.Module, windows_NS: Tensor) -> float:
    """Mean cross entropy on text that was not trained on."""
    return float(small.losses(model.eval(), windows_NS.to(next(model.parameters()).device)).mean())


def reloaded(path: Path, device: torch.device) -> MixtralForCausalLM:
    """What a server would do: a fresh model, and the packed file."""
    model = small.build().to(device)
    load_sparse_(model, path)
    return model.eval()


def draw(dense: Curve, sparse: Curve, unseen: dict[str, float], path: Path) -> None:
    """Both phases, and the losses on unseen text."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(dense) + 1), dense, label="dense")
    axes.plot(range(len(dense) + 1, len(dense) + len(sparse) + 1), sparse, label=f"{CONFIG}, SR-STE")
    places = (len(dense), len(dense) + len(sparse), len(dense) + len(sparse))
    for (name, loss), step, marker in zip(unseen.items(), places, "o+x", strict=True):
        axes.plot(step, loss, marker, color="black", markersize=9, fillstyle="none", label=f"unseen text: {name}")
    axes.axvline(len(dense) + 0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token", title="Dense, then 75 % sparse experts")
    axes.legend(loc="upper right", edgecolor="none", framealpha=1)
    figure.savefig(path, dpi=120)


def run(stream_N: Tensor, windows_NS: Tensor, dense_steps: int, sparse_steps: int, folder: Path) -> list[str]:
    """The whole way; returns what went wrong."""
    torch.manual_seed(0)
    model, report, unseen = small.build(), Report(), {}
    model.compile(backend="samoyeds", options={"report": report})
    dense = train(model, stream_N, dense_steps, 3e-3)
    unseen["dense"] = loss_of(model, windows_NS)
    sparse = sparse_phase(model, stream_N, sparse_steps)
    unseen["75 % sparse"] = loss_of(model, windows_NS)
    sparsify_(model, CONFIG, method="magnitude", progress=False)  # packs; nothing is left to prune
    save_sparse(model, folder / "packed.safetensors")
    served = reloaded(folder / "packed.safetensors", model.device)
    compiled = torch.compile(served, backend="samoyeds", options={"report": report})
    unseen["packed, reloaded, compiled"] = float(small.losses(compiled, windows_NS.to(model.device)).mean())
    draw(dense, sparse, unseen, folder / "loss.png")
    (folder / "loss.json").write_text(json.dumps({"dense": dense, "sparse": sparse, "unseen": unseen}, indent=1) + "\n")
    print("loss on unseen text: " + ", ".join(f"{name} {loss:.4f}" for name, loss in unseen.items()))
    return problems(report, unseen)


def problems(report: Report, unseen: dict[str, float]) -> list[str]:
    """What must not be."""
    found = [f"{block.module}: not rewritten: {block.reason}" for block in report.blocks if not block.rewritten]
    _, trained, served = unseen.values()
    if abs(served / trained - 1) > TOLERANCE:
        found.append(f"loss is {served:.4f} reloaded and compiled, {trained:.4f} after training")
    return found if report.blocks else [*found, "no block was found"]


def main() -> int:
    """Train, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=int, default=400, help="steps of dense training")
    parser.add_argument("--sparse", type=int, default=200, help="steps of sparse training")
    parser.add_argument("--out", type=Path, default=Path("samoyeds_pretrain"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = small.tokenizer()
    stream = corpus.tokens(corpus.training()[::EVERY], tokenizer)
    unseen = corpus.windows(corpus.tokens(corpus.held_out()[::4], tokenizer), LENGTH, 32)
    found = run(stream, unseen, options.dense, options.sparse, options.out)
    print(*found, sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
