"""What packing saves: resident memory of a real model before and after `sparsify_`, and the peak in between.

    python -m benchmarks.memory              # writes benchmarks/results/memory.json

A Mixtral of transformers with random bfloat16 weights is built in a process of its own for each pattern. Measured is
what the kernel says the process holds (VmRSS; VmHWM for the peak, reset before), after the allocator gave back what it
could, minus what it holds without a model. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.common import machine, save
from samoyeds_compile import PackedTensor, SparsityConfig, sparsify_

CONFIGS = (SparsityConfig(1, 1, 32), SparsityConfig(1, 2, 32), SparsityConfig(1, 2, 128, group=16))
SIZES = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "num_local_experts": 8}
MIB = 2**20


def build() -> MixtralForCausalLM:
    """A model of which nearly all weights are experts'."""
    config = MixtralConfig(vocab_size=1024, num_attention_heads=16, num_key_value_heads=4, **SIZES)
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def resident(peak: bool = False) -> float:
    """MiB that the process holds, or held at most since `forget_peak`."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    name = "VmHWM" if peak else "VmRSS"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Start the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(number: int) -> dict[str, Any]:
    """One pattern, in this process."""
    config, empty = CONFIGS[number], resident()
    model = build()
    dense = resident() - empty
    stacks = [p for p in model.parameters() if p.dim() == 3]
    weights, largest = sum(p.nbytes for p in stacks) / MIB, max(p.nbytes for p in stacks) / MIB
    del stacks
    forget_peak()
    sparsify_(model, config, method="magnitude", progress=False)
    peak, after = resident(peak=True) - empty, resident() - empty
    packed = sum(p.packed_nbytes for p in model.parameters() if isinstance(p, PackedTensor)) / MIB
    return {
        "config": str(config), "model_mib": dense, "expert_weights_mib": weights, "largest_stack_mib": largest,
        "after_mib": after, "packed_mib": packed, "packed_share": packed / weights,
        "resident_share_of_experts": (after - (dense - weights)) / weights,
        "peak_above_model_mib": peak - dense, "peak_above_model_stacks": (peak - dense) / largest,
    }  # fmt: skip


def main() -> None:
    """Measure each pattern in a new process, print, write."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    rows = []
    for number in range(len(CONFIGS)):
        command = [sys.executable, "-m", "benchmarks.memory", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        print(rows[-1], flush=True)
    save("memory", rows, {**machine(), "model": {"class": "MixtralForCausalLM", "dtype": "bfloat16", **SIZES}})


if __name__ == "__main__":
    main()
