"""Tokens per second in ``generate``: eager, Inductor and Samoyeds, dense and with sparse experts.

    python -m benchmarks.generate [--models mixtral qwen3 deepseek small_lm] [--threads N] [--json FILE]

The models of the quick start with random weights, and the small trained one. Each arm calls ``model.generate`` of
transformers, greedily, with a static cache: the prompt is read eagerly and each further token by one compiled graph,
which ``generate`` compiles itself. Sparse experts are pruned by magnitude; ``inductor`` and ``eager`` are dense, since
no pattern makes them faster. The arms take turns; a generation before them compiles and is not counted, and graphs
that are compiled later are an error. Rates are those of the tokens after the first, so the prompt is not in them.

How much is to be gained is stated beside: the MoE blocks' share of a token's time with Inductor, from the blocks
compiled and timed alone, and how much faster generation would be if they took no time at all (Amdahl).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.common import DTYPES, RESULTS, machine, quieten
from benchmarks.cpu.arms import EAGER, INDUCTOR, PREFIX, kernel_of
from benchmarks.cpu.shapes import DENSE, PATTERNS, densified, pruned
from benchmarks.cpu.timing import Timing, alternate, clock_of
from examples import quickstart
from examples.small_lm import model as small
from samoyeds_compile import Report
from samoyeds_compile.backend import samoyeds

Row = dict[str, Any]
Backend = str | Callable[..., Any]
BLOCKS = "moe blocks with inductor"
BLOCK_CALLS = 20
MODELS = (*quickstart.CONFIGS, "small_lm")
SPARSE = ("2:4", "1:2:32")


def build(name: str, dtype: str, layers: int) -> PreTrainedModel:
    """A model of the quick start with random weights, or the small trained one."""
    torch.manual_seed(0)
    if name == "small_lm":
        model = small.load(DTYPES[dtype])
    else:
        model = quickstart.build(name, argparse.Namespace(seed=0, layers=layers, dtype=dtype))
    return model.requires_grad_(False)


class Clock(BaseStreamer):
    """When each token came; the first call brings the prompt."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self.times = now, list[float]()

    def put(self, value: Tensor) -> None:
        self.times.append(self._now())

    def end(self) -> None:
        pass

    @property
    def milliseconds(self) -> float:
        """For a token, the first left out."""
        first, *_, last = self.times[1:]
        return 1e3 * (last - first) / (len(self.times) - 2)


@dataclass(frozen=True)
class Arm:
    """A model of its own, as ``generate`` keeps the compiled form there, and what ``torch.compile`` takes as backend.

    Attributes:
        backend: None for eager.
        report: what Samoyeds did.
    """

    model: PreTrainedModel
    backend: Backend | None
    report: Report = field(default_factory=Report)


def arms_of(model: PreTrainedModel) -> dict[str, Arm]:
    """Eager, Inductor, and Samoyeds by pattern."""
    arms = {EAGER: Arm(copy.deepcopy(model), None), INDUCTOR: Arm(copy.deepcopy(model), INDUCTOR)}
    arms[PREFIX + DENSE] = _samoyeds(model)
    return arms | {PREFIX + pattern: _samoyeds(pruned(model, PATTERNS[pattern])) for pattern in SPARSE}


def _samoyeds(model: PreTrainedModel) -> Arm:
    """The backend is a function, as ``generate`` copies options, and so a report, before it passes them on."""
    report = Report()

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return samoyeds(graph, inputs, options={"report": report})

    return Arm(model, backend, report)


def generate(arm: Arm, prompt: Tensor, tokens: int, now: Callable[[], float]) -> float:
    """Milliseconds of a token."""
    clock, how = Clock(now), None
    if arm.backend is not None:
        how = CompileConfig(backend=arm.backend, mode=None, dynamic=False)
        how._compile_all_devices = True  # generate compiles on GPUs only, unless this is set
    arm.model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation="static",
        compile_config=how, disable_compile=how is None, streamer=clock, attention_mask=torch.ones_like(prompt),
    )  # fmt: skip
    return clock.milliseconds


def measure(name: str, model: PreTrainedModel, threads: int, prompt_length: int, tokens: int, seconds: float) -> Row:
    """One model."""
    torch._dynamo.reset()
    prompt = torch.randint(model.config.vocab_size, (1, prompt_length), generator=torch.Generator().manual_seed(0))
    arms, now = arms_of(model), clock_of(threads)
    timers = {name: partial(generate, arm, prompt, tokens, now) for name, arm in arms.items()}
    timers[BLOCKS] = partial(moe_milliseconds, compiled_blocks(arms[INDUCTOR].model), model, now)
    timing = alternate_compiled(timers, threads, seconds)
    share = timing.ratio(BLOCKS, INDUCTOR)
    ours = [arm for arm in arms if arm.startswith(PREFIX)]
    return {
        "model": name, "parameters": model.num_parameters(), "threads": threads, "prompt": prompt_length,
        "tokens": tokens, "rounds": timing.summary(),
        "ms": {arm: round(timing.median(arm), 3) for arm in timers},
        "tokens_per_second": {arm: round(1e3 / timing.median(arm), 1) for arm in arms},
        "ratio": {arm: {peer: round(timing.ratio(peer, arm), 2) for peer in (EAGER, INDUCTOR)} for arm in ours},
        "moe_share_of_inductor": round(share, 3), "most_possible": round(1 / max(1 - share, 0.01), 2),
        "deviation": {arm: float(f"{deviation(arms[arm].model, prompt):.2g}") for arm in ours},
        "blocks": {arm: {"rewritten": len(arms[arm].report.rewritten), "of": len(arms[arm].report.blocks),
                         "kernel": kernel_of(arms[arm].report)} for arm in ours},
    }  # fmt: skip


def alternate_compiled(timers: Mapping[str, Callable[[], float]], threads: int, seconds: float) -> Timing:
    """`alternate`, after a call of each that compiles.

    Raises:
        RuntimeError: graphs were compiled in the rounds, so that their times are none of the arms'.
    """
    for timer in timers.values():
        timer()
    compiled = counters["stats"]["unique_graphs"]
    timing = alternate(timers, threads, seconds)
    if counters["stats"]["unique_graphs"] != compiled:
        raise RuntimeError("graphs were compiled while times were taken")
    return timing


def compiled_blocks(model: PreTrainedModel) -> list[Callable[[Tensor], Tensor]]:
    """The MoE blocks of a model, each compiled alone with Inductor."""
    found = [module for module in model.modules() if hasattr(module, "experts")]
    return [torch.compile(block, backend=INDUCTOR, dynamic=False) for block in found]


def moe_milliseconds(
    blocks: list[Callable[[Tensor], Tensor]], model: PreTrainedModel, now: Callable[[], float]
) -> float:
    """What all MoE blocks take for a token, one after the other, as in the model."""
    x = torch.randn(1, 1, model.config.hidden_size).to(model.dtype)
    times = []
    for _ in range(BLOCK_CALLS):
        start = now()
        for block in blocks:
            block(x)
        times.append(1e3 * (now() - start))
    return statistics.median(times)


def deviation(model: PreTrainedModel, prompt: Tensor) -> float:
    """Of the prompt's last logits, after the rewrite alone, from eager on the same weights, dense; by the largest."""
    rewritten = torch.compile(model, backend="samoyeds", dynamic=False, options={"base": "eager"})
    expected = densified(model)(input_ids=prompt, use_cache=False).logits[0, -1].float()
    actual = rewritten(input_ids=prompt, use_cache=False).logits[0, -1].float()
    return float((actual - expected).abs().max() / expected.abs().max())


def show(console: Console, rows: list[Row]) -> None:
    """Rates, and how much could be gained."""
    arms = list(rows[0]["tokens_per_second"])
    table = Table(
        title="Tokens per second in generate (over Inductor); ~: foreign load in all rounds", title_justify="left"
    )
    for column in ("model", *arms, "MoE share (Inductor)", "most possible"):
        table.add_column(column, justify="right")
    for row in rows:
        rates, mark = row["tokens_per_second"], "" if row["rounds"]["quiet"] else " ~"
        cells = [f"{rates[arm]:.0f} ({rates[arm] / rates[INDUCTOR]:.2f})" for arm in arms]
        table.add_row(
            row["model"] + mark, *cells, f"{100 * row['moe_share_of_inductor']:.0f} %", f"{row['most_possible']:.2f}"
        )
    console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4, help="of the models with random weights (default: 4)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate (default: 64)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of rounds for each model; five rounds at least")
    parser.add_argument("--json", type=Path, default=RESULTS / "generate.json", metavar="FILE")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure each model, print, write; the file has all models that are done."""
    options, console = parse(arguments), Console(width=None if sys.stdout.isatty() else 140)
    quieten()
    torch._dynamo.config.recompile_limit = 64  # one model class, many backends
    torch.set_num_threads(options.threads)
    where, rows = {**machine(), "dtype": options.dtype, "layers": options.layers}, []
    for name in options.models:
        with console.status(name):
            model = build(name, options.dtype, options.layers)
            rows.append(measure(name, model, options.threads, options.prompt, options.tokens, options.seconds))
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1) + "\n")
        del model
        gc.collect()
    show(console, rows)


if __name__ == "__main__":
    main()
