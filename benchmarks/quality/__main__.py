"""Perplexity on held-out text: dense, structured sparse and patterns of others, one-shot and after more training.

    python -m benchmarks.quality [--seeds 0 1 2] [--work FOLDER] [--jobs 2]

Each seed has two models: one that reads all texts, and one that reads each eighth until more training does not help it
(a plateau). Writes quality.json, quality.md and quality.png to benchmarks/results; two and a half hours on two cores.
What is done is kept in the work folder, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from benchmarks.common import RESULTS, machine, save
from benchmarks.quality.plot import plot
from benchmarks.quality.study import RECONSTRUCT, Study
from benchmarks.quality.summary import summary, table
from examples.small_lm import corpus
from examples.small_lm import model as small
from examples.small_lm.recover import calibration
from examples.small_lm.train import batches

EXTRA = 200
"""Steps of training after pruning: a tenth of what the model was trained for."""
WIDE = 128
"""Windows that reconstruction reads."""
UNSEEN = 192
"""Windows of held-out text."""
PLATEAU_EVERY, PLATEAU_STEPS, PLATEAU_EXTRA = 8, 1000, 600
"""Of the models at a plateau: which texts they read, steps of training, and steps after pruning."""


def study_one(seed: int, work: Path, extra: int) -> None:
    """All rows of one seed, added to what its files have."""
    torch.set_num_threads(1)
    for folder, every, steps, more in (
        (work / f"seed{seed}", 1, 2000, extra),
        (work / f"plateau{seed}", PLATEAU_EVERY, PLATEAU_STEPS, PLATEAU_EXTRA),
    ):
        study_model(seed, folder, every, steps, more)


def study_model(seed: int, folder: Path, every: int, steps: int, extra: int) -> None:
    """The rows of one model, which is trained first unless the folder has it."""
    if not (folder / "model.safetensors").exists():
        train = [sys.executable, "-m", "examples.small_lm.train", "--seed", str(seed), "--out", str(folder)]
        subprocess.run([*train, "--every", str(every), "--steps", str(steps)], check=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = small.build()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    stream = corpus.tokens(corpus.training()[::every], tokenizer)
    unseen = corpus.windows(corpus.tokens(corpus.held_out(), tokenizer), small.CONTEXT, UNSEEN)
    torch.manual_seed(seed)
    wide = list(corpus.windows(stream, small.CONTEXT, WIDE).split(16))
    study = Study(model.eval(), unseen, calibration(stream), batches(stream, extra, seed=1000 + seed), wide)
    path = folder / "rows.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    measured = study.rows if every == 1 else study.rows_at_plateau
    for row in measured({row["name"] for row in rows}):
        rows.append(row)
        path.write_text(json.dumps(rows, indent=1))
        print(seed, row["name"], row["perplexity"], flush=True)


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "rows.json").read_text())
    return rows


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return facts


def main() -> None:
    """Study each seed in a process of its own, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "samoyeds_quality")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--extra", type=int, default=EXTRA)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        study_one(options.seeds[0], options.work, options.extra)
        return
    again = [sys.executable, "-m", "benchmarks.quality", "--one", "--work", str(options.work), "--extra"]
    with ThreadPoolExecutor(options.jobs) as pool:
        commands = [[*again, str(options.extra), "--seeds", str(seed)] for seed in options.seeds]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    kinds = [[options.work / f"{kind}{seed}" for seed in options.seeds] for kind in ("seed", "plateau")]
    rows = summary([[row for folder in of_seed for row in _rows(folder)] for of_seed in zip(*kinds, strict=True)])
    curves, plateaus = ([_facts(folder) for folder in folders] for folders in kinds)
    where = {
        **machine(),
        "extra_steps": options.extra,
        "reconstruct_steps": RECONSTRUCT,
        "held_out_tokens": UNSEEN * small.CONTEXT,
        "training": curves,
        "plateau_every_text": PLATEAU_EVERY,
        "plateau_extra_steps": PLATEAU_EXTRA,
        "plateau_training": plateaus,
    }
    save("quality", rows, where)
    (RESULTS / "quality.md").write_text(table(rows) + "\n")
    plot(rows, curves, RESULTS / "quality.png")
    print(table(rows))


if __name__ == "__main__":
    main()
