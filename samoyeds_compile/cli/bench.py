"""``samoyeds bench``: a model of one's own in eager mode, with Inductor and with Samoyeds, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from samoyeds_compile import Report
from samoyeds_compile.cli.output import AsJson, fail, show
from samoyeds_compile.cli.target import HELP, BadTarget, load

ARMS = ("eager", "inductor", "samoyeds")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def bench(
    target: Annotated[str, typer.Argument(help=HELP)],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the input made for a configuration.")] = 128,
    layers: Annotated[int, typer.Option(min=0, help="Layers of a configuration that are made; 0: all.")] = 2,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16, of a configuration's weights.")] = "fp32",
    device: Annotated[str, typer.Option(help="Where a configuration's model is made.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=3, help="Rounds in which every arm runs once; the median counts.")] = 9,
    as_json: AsJson = False,
) -> None:
    """Time a model's forward in eager mode, with Inductor and with Samoyeds; exit with 1 if no block was rewritten.

    A configuration of transformers is made a model with random weights. The arms take turns, so that what else the
    machine does meets all of them.
    """
    if dtype not in DTYPES:
        raise typer.Exit(fail(f"--dtype is {dtype}; give one of {', '.join(DTYPES)}"))
    try:
        model, args, kwargs = load(target, tokens, layers, device)
    except BadTarget as error:
        raise typer.Exit(fail(str(error))) from error
    if not target.rpartition(":")[0].endswith(".py"):
        model = model.to(DTYPES[dtype])
    result = measure(model.eval(), args, kwargs, rounds)
    show(_table(result), result, as_json)
    if not result["blocks_rewritten"]:
        raise typer.Exit(1)


@torch.no_grad()
def measure(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Milliseconds of each arm, what they have in common, and the deviation of compiled results from eager ones."""
    report = Report()
    arms: dict[str, Callable[..., Any]] = {
        "eager": model,
        "inductor": torch.compile(model, backend="inductor"),
        "samoyeds": torch.compile(model, backend="samoyeds", options={"report": report}),
    }
    console = Console(stderr=True)
    with console.status("compiling"):
        first = {name: _tensor(arm(*args, **kwargs)) for name, arm in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in track(range(rounds), "measuring", console=console, transient=True):
        for name, arm in arms.items():
            times[name].append(_milliseconds(partial(arm, *args, **kwargs)))
    medians = {name: round(statistics.median(values), 4) for name, values in times.items()}
    scale = first["eager"].abs().max().clamp(min=1e-30)
    return {
        "milliseconds": medians,
        "spread": {name: round(max(values) / min(values), 2) for name, values in times.items()},
        "inductor/samoyeds": round(medians["inductor"] / medians["samoyeds"], 3),
        "deviation": {name: float((first[name] - first["eager"]).abs().max() / scale) for name in ARMS[1:]},
        "blocks": len(report.blocks),
        "blocks_rewritten": len(report.rewritten),
        "kernels": list(dict.fromkeys(kernel for graph in report.graphs for kernel in graph.kernels)),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _milliseconds(call: Callable[[], Any]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return (time.perf_counter() - start) * 1e3


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tensor(output: Any) -> torch.Tensor:
    """The first tensor of an output, in double precision."""
    leaves = torch.utils._pytree.tree_leaves(getattr(output, "logits", output))
    return next(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)).double()


def _table(result: Mapping[str, Any]) -> Table:
    title = f"{result['blocks_rewritten']} of {result['blocks']} MoE blocks rewritten; {result['threads']} threads"
    table = Table(title=title, title_justify="left")
    for name in ("arm", "milliseconds", "largest / smallest", "eager / arm", "deviation"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm in ARMS:
        ms, deviation = result["milliseconds"][arm], result["deviation"].get(arm)
        ratio = f"{result['milliseconds']['eager'] / ms:.2f}"
        table.add_row(
            arm, f"{ms:.3f}", f"{result['spread'][arm]:.2f}", ratio, "" if deviation is None else f"{deviation:.1e}"
        )
    return table
