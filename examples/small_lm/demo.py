"""What structured sparse experts do to a trained model: its perplexity on held-out text, what it writes, bytes, speed.

    python -m examples.small_lm.demo [--threads N] [--windows N] [--prompt TEXT]

Three models: dense; 2:4, pruned here and now and fitted layer by layer to what the dense one gave, without labels; and
75 %, read from a packed checkpoint that was trained after pruning (`recover.py`). Each is compiled with Samoyeds and
run on text that no model was trained on: docstrings of the packages installed here. The exit status is 1 if a compiled
model differs from its eager one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import MixtralForCausalLM

from samoyeds_compile import PackedTensor, Report, SparsityConfig, load_sparse_, sparsify_

from . import corpus
from . import model as small

PROMPT = "# add_edge\nAdd an edge between u and v.\n\nThe nodes u and v will be automatically added if they are"
ROUNDS = 5
TOLERANCE = 0.01
"""Largest relative difference between the perplexities of a compiled model and of its eager one, in bfloat16."""


@dataclass
class Result:
    """What was found out about one model."""

    title: str
    model: MixtralForCausalLM
    compiled: Callable[..., object]
    report: Report
    perplexity: float
    eager_perplexity: float
    text: str
    rates: list[float] = field(default_factory=list)

    @property
    def expert_bytes(self) -> int:
        """Of the experts' weights."""
        return sum(size(p) for name, p in self.model.named_parameters() if ".experts." in name)

    @property
    def all_bytes(self) -> int:
        """Of all weights."""
        return sum(map(size, self.model.parameters()))

    def problems(self) -> list[str]:
        """What must not be."""
        found = [f"{b.module}: not rewritten: {b.reason}" for b in self.report.blocks if not b.rewritten]
        if abs(self.perplexity / self.eager_perplexity - 1) > TOLERANCE:
            found.append(f"perplexity is {self.perplexity:.3f} compiled, {self.eager_perplexity:.3f} eager")
        return [f"{self.title}: {problem}" for problem in found]


def size(parameter: Tensor) -> int:
    """Bytes that a parameter takes."""
    return parameter.packed_nbytes if isinstance(parameter, PackedTensor) else parameter.nbytes


def plain_24() -> MixtralForCausalLM:
    """2:4 experts: one call, calibrated on held-out documents that are not measured on."""
    model, tokenizer = small.load(torch.bfloat16), small.tokenizer()
    some = corpus.tokens(corpus.held_out()[::2], tokenizer)
    given = list(corpus.windows(some, small.CONTEXT, 64).split(16))
    sparsify_(model, SparsityConfig(1, 1, 32), calibration=given, permute=True, reconstruct=60, progress=False)
    return model


def sparse_75() -> MixtralForCausalLM:
    """75 % sparse experts, trained after pruning."""
    model = small.load(torch.bfloat16)
    load_sparse_(model, small.SPARSE)
    return model


def examine(title: str, model: MixtralForCausalLM, unseen: Tensor, prompt: str) -> Result:
    """Compile a model, and run it and its eager form on the held-out text."""
    report = Report()
    compiled = torch.compile(model, backend="samoyeds", options={"report": report})
    eager, found = small.perplexity(model, unseen), small.perplexity(compiled, unseen)
    return Result(title, model, compiled, report, found, eager, small.continuation(model, prompt))


def measure(results: list[Result], unseen: Tensor) -> None:
    """Tokens read per second, compiled; the models take turns."""
    ids = unseen[:16]
    with torch.inference_mode():
        for number in range(ROUNDS + 1):
            for result in results if number % 2 else reversed(results):
                start = time.perf_counter()
                result.compiled(input_ids=ids)
                if number:
                    result.rates.append(ids.numel() / (time.perf_counter() - start))


def table(results: list[Result], count: int) -> Table:
    """A column for each model."""
    title = (
        f"A Mixtral with {results[0].model.num_parameters() / 1e6:.1f} M parameters, bf16, {count:,} held-out tokens"
    )
    found = Table(title=title, title_justify="left")
    found.add_column(no_wrap=True)
    for result in results:
        found.add_column(result.title, justify="right")
    rows: list[tuple[str, Callable[[Result], str]]] = [
        ("perplexity, compiled", lambda r: f"{r.perplexity:.3f}"),
        ("  eager", lambda r: f"{r.eager_perplexity:.3f}"),
        ("  above dense", lambda r: f"{100 * (r.perplexity / results[0].perplexity - 1):+.1f} %"),
        ("bytes of experts", lambda r: f"{r.expert_bytes:,}"),
        ("  of dense", lambda r: f"{r.expert_bytes / results[0].expert_bytes:.3f}"),
        ("bytes of all weights", lambda r: f"{r.all_bytes:,}"),
        ("tokens read per second", lambda r: f"{statistics.median(r.rates):,.0f}"),
        ("MoE blocks rewritten / found", lambda r: f"{len(r.report.rewritten)} / {len(r.report.blocks)}"),
    ]
    for label, cell in rows:
        found.add_row(label, *map(cell, results))
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--windows", type=int, default=64, help="windows of held-out text (default: 64)")
    parser.add_argument("--prompt", default=PROMPT)
    return parser.parse_args()


@torch.no_grad()
def main() -> int:
    """Run all three; 0 if all is well."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    options, console = parse(), Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(options.threads)
    text = corpus.held_out()
    unseen = corpus.windows(corpus.tokens(text[1::2], small.tokenizer()), small.CONTEXT, options.windows)
    makers: dict[str, Callable[[], MixtralForCausalLM]] = {
        "dense": lambda: small.load(torch.bfloat16), "2:4, one-shot": plain_24, "75 %, trained": sparse_75,
    }  # fmt: skip
    results = []
    for title, make in makers.items():
        with console.status(f"Small model, {title}"):
            results.append(examine(title, make(), unseen, options.prompt))
    measure(results, unseen)
    console.print(table(results, unseen.numel()))
    for result in results:
        console.print(f"[bold]{result.title}[/bold] writes:")
        console.print(textwrap.indent(options.prompt + "[dim]|[/dim]" + result.text.replace("[", "\\["), "    "))
    problems = [problem for result in results for problem in result.problems()]
    console.print(*problems, sep="\n", style="red")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
