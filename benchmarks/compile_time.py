"""Compile time of a 24-layer, 64-expert model: Samoyeds against Inductor alone, and how it grows with the layers.

    python -m benchmarks.compile_time [--layers 24] [--rounds 1]

Each compilation runs in a fresh process with every cache off; the two backends alternate. The shapes are small, since
compile time does not depend on them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from rich.console import Console

from benchmarks.common import machine, save

console = Console()
BACKENDS = ("inductor", "samoyeds")


def compile_once(backend: str, layers: int, train: bool) -> dict[str, float]:
    """Seconds of the first call, of which in our pipeline; runs in a process of its own."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch._inductor.config.force_disable_caches = True
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=64, num_experts_per_tok=8, use_cache=False,
    )  # fmt: skip
    model, ids = Qwen3MoeForCausalLM(config).train(train), torch.randint(0, 128, (1, 16))
    graphs: list = []
    options = {"report": graphs.append} if backend == "samoyeds" else None
    compiled = torch.compile(model, backend=backend, options=options)
    start = time.perf_counter()
    with torch.set_grad_enabled(train):
        logits = compiled(ids).logits
        if train:
            logits.square().mean().backward()
    seconds = time.perf_counter() - start
    steps = {s.name: s.milliseconds for g in graphs for s in g.steps}
    rewritten = sum(b.rewritten for g in graphs for b in g.blocks)
    return {"seconds": seconds, "pipeline_ms": sum(steps.values()), "rewritten": rewritten, **steps}


def in_process(backend: str, layers: int, train: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--one", backend, str(layers), str(int(train))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def compare(layers: int, train: bool, rounds: int) -> dict[str, object]:
    """A B A B ... at one depth."""
    runs: dict[str, list[dict[str, float]]] = {backend: [] for backend in BACKENDS}
    for _ in range(rounds):
        for backend in BACKENDS:
            with console.status(f"{layers} layers, {'training' if train else 'inference'}, {backend}"):
                runs[backend].append(in_process(backend, layers, train))
    seconds = {b: statistics.median(r["seconds"] for r in runs[b]) for b in BACKENDS}
    row = {
        "layers": layers, "train": train, "seconds": {b: round(s, 2) for b, s in seconds.items()},
        "samoyeds/inductor": round(seconds["samoyeds"] / seconds["inductor"], 3),
        "pipeline_ms": round(statistics.median(r["pipeline_ms"] for r in runs["samoyeds"]), 1),
        "rewritten": runs["samoyeds"][0]["rewritten"],
    }  # fmt: skip
    console.print(row)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("BACKEND", "LAYERS", "TRAIN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        backend, layers, train = options.one
        print(json.dumps(compile_once(backend, int(layers), bool(int(train)))))
        return
    where = machine()
    depths = sorted({max(1, options.layers // 4), max(1, options.layers // 2), options.layers})
    rows = [compare(layers, False, options.rounds) for layers in depths]
    rows.append(compare(depths[0], True, options.rounds))
    console.print("saved to", save("compile_time", rows, where))


if __name__ == "__main__":
    main()
