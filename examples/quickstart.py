"""Three mixture-of-experts models, each run in eager mode, with Inductor, and with Samoyeds.

    python examples/quickstart.py [--model mixtral|qwen3|deepseek|all] [--dtype bf16|fp32] [--layers N] [--tokens N]

The models are those of transformers, unmodified, with random weights and the proportions of Mixtral-8x7B, Qwen3-30B-A3B
and DeepSeek-V3, scaled down. Each reads a prompt and generates tokens greedily; both phases are compiled. What is
printed was measured in this run. The exit status is 1 if a block was not rewritten or a deviation is too large.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.utils import fresh_cache
from transformers import DeepseekV3Config, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig, StaticCache

from samoyeds_compile import Report

EAGER, INDUCTOR, SAMOYEDS = WAYS = ("eager", "inductor", "samoyeds")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARY = 4096
PROMPT = 128
MEASURE_SECONDS = 6.0
STRICT = 1e-4
"""Largest deviation of any token in fp32, where no two correct programs differ by more than rounding."""
TYPICAL = {"bf16": 0.02, "fp32": 1e-5}
"""Largest median deviation of the tokens, or twice Inductor's where that is more."""


# ------------------------------------------------------------------------------------------------------------ models


def mixtral(layers: int) -> PreTrainedConfig:
    """Mixtral-8x7B with every width divided by 8."""
    return MixtralConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=512, intermediate_size=1792,
        num_local_experts=8, num_experts_per_tok=2, num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip


def qwen3(layers: int) -> PreTrainedConfig:
    """Qwen3-30B-A3B with every width divided by 4."""
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, hidden_size=512, moe_intermediate_size=192,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, intermediate_size=1536,
        num_attention_heads=16, num_key_value_heads=2, head_dim=64,
    )  # fmt: skip


def deepseek(layers: int) -> PreTrainedConfig:
    """DeepSeek-V3 with most widths divided by 8 and a quarter of the experts; its first layer is dense."""
    return DeepseekV3Config(
        vocab_size=VOCABULARY, num_hidden_layers=layers, first_k_dense_replace=min(1, layers - 1), hidden_size=896,
        intermediate_size=2304, moe_intermediate_size=256, n_shared_experts=1,
        n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=4,
        num_attention_heads=16, num_key_value_heads=16, q_lora_rank=192, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    )  # fmt: skip


CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {"mixtral": mixtral, "qwen3": qwen3, "deepseek": deepseek}
TITLES = {"mixtral": "Mixtral", "qwen3": "Qwen3-MoE", "deepseek": "DeepSeek-V3"}


def build(name: str, args: argparse.Namespace) -> PreTrainedModel:
    """The model with random weights, in evaluation mode."""
    torch.manual_seed(args.seed)
    config = CONFIGS[name](args.layers)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype]).eval()


# ----------------------------------------------------------------------------------------------------------- running


@dataclass
class Session:
    """One model, one prompt, and the ways to run the model: eager, Inductor, Samoyeds."""

    model: PreTrainedModel
    prompt: Tensor
    cache: StaticCache
    report: Report
    ways: dict[str, Callable[..., Any]]

    def prefill(self, way: str) -> Tensor:
        """Read the prompt into an empty cache; the logits of all its tokens, [PROMPT, VOCABULARY]."""
        self.cache.reset()
        return self.ways[way](input_ids=self.prompt, past_key_values=self.cache, use_cache=True).logits[0]

    def step(self, way: str, token: Tensor) -> Tensor:
        """Logits after one more token, [VOCABULARY]."""
        return self.ways[way](input_ids=token.view(1, 1), past_key_values=self.cache, use_cache=True).logits[0, -1]

    def generate(self, way: str, first: Tensor, count: int) -> Tensor:
        """Generate greedily behind the prompt; the ``count`` tokens that follow ``first``."""
        tokens = [first]
        for _ in range(count):
            tokens.append(self.step(way, tokens[-1]).argmax())
        return torch.stack(tokens[1:])

    def choices(self, way: str, tokens: Tensor) -> Tensor:
        """What greedy decoding would choose after each of ``tokens``, whatever it chose before."""
        self.prefill(way)
        return torch.stack([self.step(way, token).argmax() for token in tokens])


def start(model: PreTrainedModel, dump: Path, tokens: int) -> Session:
    """Set up the three ways; nothing is compiled before the first call.

    Both compilers get static shapes, one graph for the prompt and one for generation. Left to itself, Dynamo would make
    the second compiler's prompt length a symbol, having seen two lengths by then.
    """
    report = Report()
    prompt = torch.randint(VOCABULARY, (1, PROMPT))
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + tokens)
    ways = {
        EAGER: model,
        INDUCTOR: torch.compile(model, backend="inductor", dynamic=False),
        SAMOYEDS: torch.compile(model, backend="samoyeds", dynamic=False, options={"report": report, "dump": dump}),
    }
    return Session(model, prompt, cache, report, ways)


# --------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Result:
    """What was measured on one model; numbers by way of running it."""

    parameters: int
    dtype: str
    report: Report
    dump: Path
    tokens: int
    compile: dict[str, float] = field(default_factory=dict)
    typical: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    agree: dict[str, int] = field(default_factory=dict)
    prefill: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    decode: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})
    strict: float = 0.0

    @property
    def own_seconds(self) -> float:
        """Time that the passes of Samoyeds took."""
        return sum(step.milliseconds for graph in self.report.graphs for step in graph.steps) / 1e3

    def complaints(self) -> list[str]:
        """What must not be: blocks left alone, deviations beyond the tolerance."""
        found = [f"{b.module}: not rewritten: {b.reason}" for b in self.report.blocks if not b.rewritten]
        found += [f"graph {g.name}: {g.problem}" for g in self.report.graphs if g.problem]
        if not self.report.blocks:
            found.append("no MoE block found")
        if not self.strict <= STRICT:
            found.append(f"in fp32 a token deviates by {self.strict:.1e}, more than {STRICT:.0e}")
        allowed = max(TYPICAL[self.dtype], 2 * self.typical[INDUCTOR])
        if not self.typical[SAMOYEDS] <= allowed:
            found.append(f"the typical token deviates by {self.typical[SAMOYEDS]:.1e}, more than {allowed:.0e}")
        return found


Stage = Callable[[str], contextlib.AbstractContextManager[None]]


def run_model(name: str, args: argparse.Namespace, stage: Stage) -> Result:
    """Everything about one model."""
    with stage("building the model"):
        model = build(name, args)
    dump = fresh_folder(args.dump / name)
    session = start(model, dump, args.tokens)
    result = Result(model.num_parameters(), args.dtype, session.report, dump, args.tokens)
    with fresh_cache():
        compile_all(session, result, stage)
        with stage("comparing with eager"):
            compare(session, result)
        with stage("measuring speed"):
            measure_speed(session, result)
    with stage("comparing in fp32, rewrite only"):
        result.strict = strict_deviation(session)
    return result


def compile_all(session: Session, result: Result, stage: Stage) -> None:
    """The first calls of each way, which compile it; eager goes first and allocates the cache."""
    for way in WAYS:
        with stage("running eager" if way == EAGER else f"compiling with {way}"):
            began = time.perf_counter()
            first = session.prefill(way)[-1].argmax()
            session.generate(way, first, 1)
            result.compile[way] = time.perf_counter() - began


def compare(session: Session, result: Result) -> None:
    """Deviations from eager: of the prompt's logits, and of the choices along eager's own generation."""
    expected = session.prefill(EAGER)
    first = expected[-1].argmax()
    tokens = session.generate(EAGER, first, result.tokens)
    given = torch.cat([first.view(1), tokens[:-1]])
    for way in (INDUCTOR, SAMOYEDS):
        each = deviations(session.prefill(way), expected)
        result.typical[way], result.worst[way] = float(each.median()), float(each.max())
        result.agree[way] = int((session.choices(way, given) == tokens).sum())


def deviations(actual: Tensor, expected: Tensor) -> Tensor:
    """Relative deviation of each token's logits: |actual - expected| / |expected|."""
    difference = (actual.float() - expected.float()).norm(dim=-1)
    return difference / expected.float().norm(dim=-1)


def measure_speed(session: Session, result: Result) -> None:
    """Alternate the ways, another one first each round."""
    for order in rounds(MEASURE_SECONDS):
        for way in order:
            session.prefill(way)  # the processor's caches are cold after another way's turn
            logits, seconds = timed(session.prefill, way)
            result.prefill[way].append(PROMPT / seconds)
            _, seconds = timed(session.generate, way, logits[-1].argmax(), result.tokens)
            result.decode[way].append(result.tokens / seconds)


def rounds(seconds: float) -> Iterator[tuple[str, ...]]:
    """Orders of the ways, each taking its turn at being first; at least three, then until the time is up."""
    end = time.perf_counter() + seconds
    for number in itertools.count():
        if number >= len(WAYS) and time.perf_counter() > end:
            return
        first = number % len(WAYS)
        yield WAYS[first:] + WAYS[:first]


def timed(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, float]:
    """A result and the seconds it took."""
    began = time.perf_counter()
    return function(*args), time.perf_counter() - began


def strict_deviation(session: Session) -> float:
    """Largest deviation of a prompt token in fp32, with the rewrite applied and nothing else compiled."""
    model, report = session.model.float(), Report()
    torch._dynamo.reset()
    rewritten = torch.compile(model, backend="samoyeds", options={"base": "eager", "report": report})
    expected, actual = (run(input_ids=session.prompt, use_cache=False).logits[0] for run in (model, rewritten))
    done = report.blocks and len(report.rewritten) == len(report.blocks)
    return float(deviations(actual, expected).max()) if done else float("inf")


def fresh_folder(folder: Path) -> Path:
    """The folder, without what an earlier run dumped there."""
    if (folder / "report.json").exists():
        shutil.rmtree(folder)
    return folder


# ----------------------------------------------------------------------------------------------------------- showing


def comparison(results: dict[str, Result], args: argparse.Namespace) -> Table:
    """The one table: a column for each model."""
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    title = f"Scaled-down models, {args.dtype}, prompt of {PROMPT} tokens, {args.tokens} generated, {threads}"
    table = Table(title=title, title_justify="left")
    table.add_column(no_wrap=True)
    for name in results:
        table.add_column(TITLES[name], justify="right", overflow="fold")
    for label, cell in ROWS:
        if cell is None:
            table.add_section()
            table.add_row(f"[bold]{label}[/bold]")
        else:
            table.add_row(label, *map(cell, results.values()))
    return table


def _rate(speeds: dict[str, list[float]], way: str) -> str:
    """The median over the rounds, and how that compares with eager."""
    median, eager = statistics.median(speeds[way]), statistics.median(speeds[EAGER])
    return f"{median:,.0f} ({median / eager:.2f}x)"


def _spread(result: Result) -> str:
    """How many rounds there were, and how far apart the same measurement lay in two of them."""
    series = [*result.prefill.values(), *result.decode.values()]
    return f"{len(series[0])} ({max(max(s) / min(s) for s in series):.1f}x)"


ROWS: list[tuple[str, Callable[[Result], str] | None]] = [
    ("parameters", lambda r: f"{r.parameters / 1e6:.0f} M"),
    ("graphs compiled", lambda r: str(len(r.report.graphs))),
    ("MoE blocks rewritten / found", lambda r: f"{len(r.report.rewritten)} / {len(r.report.blocks)}"),
    ("Deviation from eager, prompt", None),
    ("typical token, samoyeds", lambda r: f"{r.typical[SAMOYEDS]:.1e}"),
    ("typical token, inductor", lambda r: f"{r.typical[INDUCTOR]:.1e}"),
    ("worst token, samoyeds", lambda r: f"{r.worst[SAMOYEDS]:.1e}"),
    ("worst token, inductor", lambda r: f"{r.worst[INDUCTOR]:.1e}"),
    ("worst, rewrite alone, fp32", lambda r: f"{r.strict:.1e}"),
    ("Same next token as eager", None),
    ("samoyeds", lambda r: f"{r.agree[SAMOYEDS]} / {r.tokens}"),
    ("inductor", lambda r: f"{r.agree[INDUCTOR]} / {r.tokens}"),
    ("Prompt, tokens/s", None),
    *((way, lambda r, way=way: _rate(r.prefill, way)) for way in WAYS),
    ("Generation, tokens/s", None),
    *((way, lambda r, way=way: _rate(r.decode, way)) for way in WAYS),
    ("rounds (fastest / slowest)", _spread),
    ("Compilation, s", None),
    ("inductor, first", lambda r: f"{r.compile[INDUCTOR]:.1f}"),
    ("samoyeds, second", lambda r: f"{r.compile[SAMOYEDS]:.1f}"),
    ("of it, passes of samoyeds", lambda r: f"{r.own_seconds:.1f}"),
    ("dump folder", lambda r: str(r.dump)),
]
NOTES = (
    "Graphs and blocks: one graph for the prompt, one for generation; a block counts once in each.",
    "Deviation is |logits - eager's logits| / |eager's logits| of a prompt token. In bf16 every compiler rounds a bit "
    "differently, and where two experts nearly tie in the router a token may go to the other one: see the worst "
    "tokens. The comparison in fp32, with the rewrite applied and nothing else compiled, is the strict one.",
    "Next token: the greedy choice after each token that eager generated.",
    "Speed: medians of alternating rounds, on this machine, now; rounds far apart mean that it had other work to do.",
    "Compilation: Samoyeds goes second and finds the C++ kernels of the parts that it leaves alone in Inductor's "
    "cache, so the two times do not compare.",
)


def show(console: Console, results: dict[str, Result], args: argparse.Namespace) -> None:
    """The table, the report of the first model, and where to look next."""
    console.print(comparison(results, args), *NOTES, "", sep="\n", highlight=False)
    name, first = next(iter(results.items()))
    console.print(f"[bold]Report on the {TITLES[name]}-style model[/bold]", first.report, "", sep="\n")
    folder = Path(first.report.graphs[0].dump or first.dump)
    console.print(f"Before and after, as runnable Python: {folder / 'before.py'} {folder / 'after_lower.py'}")


def stages(console: Console, title: str) -> Stage:
    """Context managers that show what is going on, and for how long it did."""

    @contextlib.contextmanager
    def stage(what: str) -> Iterator[None]:
        began = time.perf_counter()
        with console.status(f"{title}: {what}"):
            yield
        console.print(f"{title}: {what} [dim]{time.perf_counter() - began:.1f} s[/dim]", highlight=False)

    return stage


def positive(text: str) -> int:
    """A number from 1 on."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*CONFIGS, "all"], default="all")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--layers", type=positive, default=2, help="layers of each model (default: 2)")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens to generate (default: 32)")
    parser.add_argument("--dump", type=Path, default=Path("samoyeds_dump"), help="folder for the graphs")
    parser.add_argument(
        "--threads", type=positive, default=1, help="threads of the models (default: 1, undisturbed by others)"
    )
    parser.add_argument("--seed", type=int, default=0, help="for weights and prompt")
    return parser.parse_args(arguments)


def quieten() -> None:
    """Keep remarks of Dynamo about the source of transformers out of the output."""
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    transformers.logging.set_verbosity_error()


@torch.no_grad()
def main() -> int:
    """Run the models asked for; 0 if all is well."""
    args, console = parse(), Console(width=None if sys.stdout.isatty() else 140)
    quieten()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    names = list(CONFIGS) if args.model == "all" else [args.model]
    with stages(console, "C++ compiler")("warming up"):
        torch.compile(torch.sin)(torch.ones(64))
    results = {name: run_model(name, args, stages(console, TITLES[name])) for name in names}
    show(console, results, args)
    problems = [f"{TITLES[name]}: {text}" for name, result in results.items() for text in result.complaints()]
    for problem in problems:
        console.print(f"[red]{problem}[/red]", highlight=False)
    console.print(f"{'Problems found' if problems else 'All well'}; {time.perf_counter() - began:.0f} s in total.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
