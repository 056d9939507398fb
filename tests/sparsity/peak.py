"""Resident memory while `sparsify_` works: ``python -m tests.sparsity.peak '{"method": "magnitude"}'``. Linux only.

What the kernel says of this process is measured, after another model was made sparse in the same way: code that is
loaded when it first runs is no weight. The least of some runs, as what an allocator keeps is none either.
"""

import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import MIB, forget_peak, resident
from samoyeds_compile import SparsityConfig, sparsify_
from samoyeds_compile.sparsity import order


class Experts(nn.Module):
    """Stacks as transformers has them; what experts give is not looked at."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.randn(experts, width, inner))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states


class Model(nn.Module):
    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.experts = Experts(experts, width, inner)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = x[:, : len(self.experts.down_proj)].softmax(-1).topk(2)
        return self.experts(x, ids, weights)


def measure(experts: int, width: int, inner: int, arguments: dict[str, Any]) -> dict[str, float]:
    """MiB: ``dense`` weights, the largest ``stack``, ``peak`` above the dense model, ``left`` of the weights."""
    model = Model(experts, width, inner)
    calibration = [torch.randn(256, width)]
    sizes, before = [p.nbytes / MIB for p in model.parameters()], resident()
    forget_peak()
    sparsify_(model, SparsityConfig(1, 2, 32), calibration=calibration, progress=False, **arguments)
    peak = resident(peak=True) - before
    return {"dense": sum(sizes), "stack": max(sizes), "peak": peak, "left": sum(sizes) + resident() - before}


if __name__ == "__main__":
    order.SWEEPS = 2  # a round takes as much as many
    given = json.loads(sys.argv[1])
    measure(8, 512, 512, given)
    found = [measure(16, 512, 512, given) for _ in range(3)]
    print(json.dumps({key: min(run[key] for run in found) for key in found[0]}))
