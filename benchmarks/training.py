"""A step of training, forward and backward: Samoyeds against Inductor, time and peak memory.

    python -m benchmarks.training [--models mixtral qwen3 deepseek] [--threads N] [--json FILE]

The models of the quick start with random weights, in train mode. ``dense`` trains all parameters; ``masked`` does so
with experts that `make_trainable_` masked to 1:2:32 (masters stay dense, so both arms compute dense products). The
arms take turns on the same weights, each step with tokens that no step had before: routing, and with it the number of
rows of each expert, is new in every step, as it is in training. A turn is some steps, of which the first does not
count: it meets memory as the other arm left it, and in training nobody comes between two steps. Gradients are new
memory in every step (``zero_grad(set_to_none=True)``, PyTorch's default). The step of an optimizer is left out: it is
the same code.

Time is the median over steps, and beside it the mean: where a virtual machine gives free memory back to its host, a
step that touches such memory again takes longer, on large pages by tenths of a second.

Ratios above 1 mean that Samoyeds is faster, or that it takes less memory. Memory is what the process held at most in a
step (VmHWM, Linux only) above what it held before: activations, gradients of all parameters, and what is in passing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.common import RESULTS, forget_peak, machine, quieten, resident
from benchmarks.cpu.timing import Timing, alternate, clock_of
from examples import quickstart
from samoyeds_compile import Report, SparsityConfig
from samoyeds_compile.sparsity.training import make_trainable_

Row = dict[str, Any]
Step = Callable[[], None]
INDUCTOR, SAMOYEDS = "inductor", "samoyeds"
WEIGHTS = ("dense", "masked")
PATTERN = SparsityConfig(1, 2, 32)
LENGTH = 128
"""Of a sequence; as many of them as make the number of tokens."""
WARM_UP, PEAKS = 3, 7
"""Steps that do not count, and steps whose peak is taken."""
TURN = 4
"""Steps of a turn that count."""


@dataclass(frozen=True)
class Point:
    """What is measured."""

    model: str
    dtype: str
    weights: str
    tokens: int
    layers: int = 2


def build(point: Point) -> PreTrainedModel:
    """The model in train mode; without a cache of keys and values, which training does not need."""
    sizes = argparse.Namespace(seed=0, layers=point.layers, dtype=point.dtype)
    model = quickstart.build(point.model, sizes).train()
    model.config.use_cache = False
    if point.weights == "masked":
        make_trainable_(model, expert_parameters(model), PATTERN)
    return model


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the stacks of experts."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def batches(tokens: int, vocabulary: int) -> Iterator[Tensor]:
    """Token ids [B, L], never the same ones again."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(vocabulary, (tokens // LENGTH, LENGTH), generator=generator)


def step_of(forward: Callable[..., Any], model: PreTrainedModel, inputs: Iterator[Tensor]) -> Step:
    """Forward and backward of the next batch, into new gradients."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        ids = next(inputs)
        forward(input_ids=ids, labels=ids).loss.backward()

    return step


def peaks_of(arms: dict[str, Step], model: PreTrainedModel) -> dict[str, float]:
    """MiB that each arm held at most above what the process held before; medians of steps that take turns.

    What a step leaves to the allocator differs from step to step, and the next one starts with it.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(PEAKS):
        for name, step in arms.items():
            model.zero_grad(set_to_none=True)
            before = resident()
            forget_peak()
            step()
            found[name].append(resident(peak=True) - before)
    return {name: statistics.median(peaks) for name, peaks in found.items()}


def apart(point: Point, threads: int, seconds: float) -> Row:
    """`measure` in a new process: what the memory of one point left behind is no matter of the next one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, point, threads, seconds).result()


def measure(point: Point, threads: int, seconds: float) -> Row:
    """One point.

    Raises:
        RuntimeError: a block was not rewritten.
    """
    quieten()
    torch.set_num_threads(threads)
    model, report = build(point), Report()
    compiled = {
        INDUCTOR: torch.compile(model, backend="inductor"),
        SAMOYEDS: torch.compile(model, backend="samoyeds", options={"report": report}),
    }
    inputs = batches(point.tokens, quickstart.VOCABULARY)
    arms = {name: step_of(forward, model, inputs) for name, forward in compiled.items()}
    for step in list(arms.values()) * WARM_UP:
        step()
    if not report.blocks or not all(block.rewritten for block in report.blocks):
        raise RuntimeError(f"{point}: only {len(report.rewritten)} blocks were rewritten")
    steps: dict[str, list[float]] = {name: [] for name in arms}
    timers = {name: timer(step, threads, steps[name]) for name, step in arms.items()}
    timing = alternate(timers, threads, seconds)
    return row_of(point, steps, timing, peaks_of(arms, model))


def timer(step: Step, threads: int, taken: list[float]) -> Callable[[], float]:
    """Adds milliseconds of the steps of a turn that count to ``taken``, and gives their mean."""
    clock = clock_of(threads)

    def run() -> float:
        step()
        for _ in range(TURN):
            start = clock()
            step()
            taken.append((clock() - start) * 1e3)
        return statistics.mean(taken[-TURN:])

    return run


def row_of(point: Point, steps: dict[str, list[float]], timing: Timing, peaks: dict[str, float]) -> Row:
    """What is printed and written: medians and means over all steps that count."""
    medians, means = ({name: of(taken) for name, taken in steps.items()} for of in (statistics.median, statistics.mean))
    return {
        **vars(point),
        "ms": {name: round(ms, 1) for name, ms in medians.items()},
        "mean_ms": {name: round(ms, 1) for name, ms in means.items()},
        "ratio": round(medians[INDUCTOR] / medians[SAMOYEDS], 3),
        "mean_ratio": round(means[INDUCTOR] / means[SAMOYEDS], 3),
        "peak_mib": {name: round(peak, 1) for name, peak in peaks.items()},
        "memory_ratio": round(peaks[INDUCTOR] / peaks[SAMOYEDS], 3),
        "rounds": timing.summary(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write after each point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(quickstart.CONFIGS), default=list(quickstart.CONFIGS))
    parser.add_argument("--dtypes", nargs="+", choices=list(quickstart.DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 1024], help=f"multiples of {LENGTH}")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=15.0, help="to measure each point for, at least 5 rounds")
    parser.add_argument("--json", type=Path, default=RESULTS / "training.json", metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    where, rows = machine(), list[Row]()
    for model in options.models:
        for dtype in options.dtypes:
            for weights in options.weights:
                for tokens in options.tokens:
                    point = Point(model, dtype, weights, tokens, options.layers)
                    rows.append(apart(point, options.threads, options.seconds))
                    print(rows[-1], flush=True)
                    options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
