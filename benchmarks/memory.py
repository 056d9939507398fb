"""What packing saves: resident memory of a real model before and after `sparsify_`, and the peak in between.

    python -m benchmarks.memory              # writes benchmarks/results/memory.json

A Mixtral of transformers with random bfloat16 weights is built in a process of its own for each case. Measured is what
the kernel says the process holds (VmRSS; VmHWM for the peak, reset before), after the allocator gave back what it
could, minus what it holds without the model. The peak is that of all of `sparsify_`, calibration too. Linux only.

Two things are no weights and are made before: code that is loaded when it first runs (a tiny model is made sparse), and
the kernels that oneDNN keeps for each number of tokens that an expert gets (where there is calibration, the dense model
runs on it; `model_mib` has them).
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.common import MIB, forget_peak, machine, resident, save
from samoyeds_compile import PackedTensor, SparsityConfig, sparsify_

TWO_OF_FOUR, DEFAULT = SparsityConfig(1, 1, 32), SparsityConfig(1, 2, 32)
GROUPED = SparsityConfig(1, 2, 128, group=16)
CASES: tuple[tuple[SparsityConfig, int, dict[str, Any]], ...] = (
    *((config, 4, {"method": "magnitude"}) for config in (TWO_OF_FOUR, DEFAULT, GROUPED)),
    *((config, 4, {"method": "router_wanda"}) for config in (TWO_OF_FOUR, DEFAULT)),
    *((config, 1, {"method": "router_wanda", "refine": True}) for config in (TWO_OF_FOUR, DEFAULT)),
    *((config, 1, {"method": "router_wanda", "permute": True}) for config in (TWO_OF_FOUR, DEFAULT)),
    (DEFAULT, 1, {"method": "second_order"}),
)
"""Pattern, layers, arguments. What takes long is done to one layer: the peak is at the first."""
TOKENS = (4, 1, 64)
"""Calibration: batches, sequences in each, tokens in each."""
SIZES = {"hidden_size": 1024, "intermediate_size": 3584, "num_local_experts": 8}
TINY = {"hidden_size": 128, "intermediate_size": 128, "num_local_experts": 4}


def build(sizes: dict[str, int], layers: int) -> MixtralForCausalLM:
    """A model of which nearly all weights are experts'."""
    config = MixtralConfig(
        vocab_size=1024, num_attention_heads=16, num_key_value_heads=4, num_hidden_layers=layers, **sizes
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = MixtralForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def calibration() -> list[Tensor]:
    """Token ids, the same ones each time."""
    return list(torch.randint(0, 1024, TOKENS, generator=torch.Generator().manual_seed(0)))


def measure(config: SparsityConfig, layers: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process."""
    inputs = [] if arguments["method"] == "magnitude" else calibration()
    given = {"config": config, "calibration": inputs or None, "progress": False, **arguments}
    sparsify_(build(TINY, 1), **given)
    empty = resident()
    model = build(SIZES, layers)
    with torch.no_grad():
        [model(ids) for ids in inputs]
    dense = resident() - empty
    sizes = [p.nbytes / MIB for p in model.parameters() if p.dim() == 3]
    weights, largest = sum(sizes), max(sizes)
    forget_peak()
    sparsify_(model, **given)
    peak, after = resident(peak=True) - empty, resident() - empty
    packed = sum(p.packed_nbytes for p in model.parameters() if isinstance(p, PackedTensor)) / MIB
    return {
        "config": str(config), "layers": layers, **arguments, "model_mib": dense, "expert_weights_mib": weights,
        "largest_stack_mib": largest, "after_mib": after, "packed_mib": packed, "packed_share": packed / weights,
        "resident_share_of_experts": (after - (dense - weights)) / weights,
        "peak_above_model_mib": peak - dense, "peak_above_model_stacks": (peak - dense) / largest,
    }  # fmt: skip


def main() -> None:
    """Measure each case in a new process, print, write."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(*CASES[int(sys.argv[1])])))
        return
    rows = []
    for number in range(len(CASES)):
        command = [sys.executable, "-m", "benchmarks.memory", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(rows[-1], flush=True)
    model = {"class": "MixtralForCausalLM", "dtype": "bfloat16", **SIZES}
    save("memory", rows, {**machine(), "model": model, "calibration": TOKENS})


if __name__ == "__main__":
    main()
