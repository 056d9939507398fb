"""What the dump folder costs: compile time of a model with and without it.

    python -m benchmarks.dump [--layers 24] [--rounds 3]

Each compilation runs in a fresh process with Inductor's caches off (kernels of ours are in their cache); the arms
alternate. ``off`` runs twice a round, so that the spread between two equal arms is seen beside the difference.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from benchmarks.common import machine, quieten, save

console = Console()
ARMS = ("off", "on", "off again")


def compile_once(layers: int, dump: str) -> dict[str, float]:
    """Seconds of the first call, and bytes of the dump; runs in a process of its own."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    quieten()
    torch._inductor.config.force_disable_caches = True
    config = Qwen3MoeConfig(
        vocab_size=128, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=64, num_experts_per_tok=8, use_cache=False,
    )  # fmt: skip
    model, ids = Qwen3MoeForCausalLM(config).eval(), torch.randint(0, 128, (1, 16))
    compiled = torch.compile(model, backend="samoyeds", options={"dump": dump} if dump else None)
    start = time.perf_counter()
    with torch.no_grad():
        compiled(ids)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in Path(dump).rglob("*") if path.is_file()) if dump else 0
    return {"seconds": seconds, "bytes": size}


def in_process(layers: int, arm: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        dump = f"{folder}/dump" if arm == "on" else ""
        command = [sys.executable, "-m", "benchmarks.dump", "--one", str(layers), dump]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("LAYERS", "DUMP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compile_once(int(options.one[0]), options.one[1])))
        return
    where, runs = machine(), {arm: [] for arm in ARMS}
    in_process(options.layers, "off")  # compiles our kernels, which stay in their cache
    for number in range(options.rounds):
        for arm in ARMS:
            with console.status(f"round {number + 1} of {options.rounds}, dump {arm}"):
                runs[arm].append(in_process(options.layers, arm))
    seconds = {arm: round(statistics.median(run["seconds"] for run in runs[arm]), 2) for arm in ARMS}
    row = {
        "layers": options.layers, "rounds": options.rounds, "seconds": seconds,
        "on/off": round(seconds["on"] / seconds["off"], 3),
        "off again/off": round(seconds["off again"] / seconds["off"], 3),
        "dump_bytes": runs["on"][0]["bytes"],
    }  # fmt: skip
    console.print(row)
    console.print("saved to", save("dump", [row], where))


if __name__ == "__main__":
    main()
