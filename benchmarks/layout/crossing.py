"""From how many tokens on tiles are faster than rows: measured, against what was solved for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cpu.timing import clock_of, measure
from samoyeds_codegen.cpp.layouts import MOST, Layouts
from samoyeds_compile import PackedTensor
from samoyeds_compile.layout.cold import Flush
from samoyeds_compile.layout.machine import here, kind
from samoyeds_compile.layout.plan import sizes_of
from samoyeds_compile.layout.regimes import crossing
from samoyeds_compile.lower.kernels import cpu_spec

SECONDS = 0.5
EACH = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)
"""Tokens of an expert; whole tiles are among them, as tiles may be faster only when they are full."""


def crossings(block: nn.Module, config: Any, flush: Flush) -> dict[str, Any]:
    """(solved, measured): tokens of the block from which the mean expert is faster with tiles, for the first time."""
    up, down = block.experts.gate_up_proj, block.experts.down_proj
    experts, hidden, width = len(up), down.shape[-2], down.shape[-1]
    top_k, dtype = config.num_experts_per_tok, up.dtype
    options = ("silu(gate) * up", "concatenated", "out_in", "output", dtype)
    spec = cpu_spec([], [up], [down], *options)
    assert not isinstance(spec, str), spec
    solved = crossing(sizes_of(spec, 1, hidden, width, experts, top_k, False), here().constants(kind(spec)))
    packed = isinstance(up, PackedTensor)
    op = torch.ops.samoyeds.experts_packed if packed else torch.ops.samoyeds.experts_dense

    def run(tokens: int, layouts: Layouts) -> Any:
        x = torch.randn(tokens, hidden).to(dtype)
        turns = (torch.arange(top_k) + torch.arange(tokens).unsqueeze(1) * top_k) % experts  # all alike
        weights = torch.full(turns.shape, 1 / top_k)
        return lambda: op(x, turns, weights, [], [up], [down], None, None, None, *options, None, layouts.name)

    last = tokens = 0
    for each in EACH:
        last, tokens = tokens, max(each * experts // top_k, 1)
        arms = {"rows": run(tokens, Layouts.up_to(MOST)), "tiles": run(tokens, Layouts.up_to(0))}
        timing = measure(arms, torch.get_num_threads(), SECONDS, flush)
        if timing.median("tiles") < timing.median("rows"):
            break
    measured = round((max(last, 1) * tokens) ** 0.5)
    clock = clock_of(torch.get_num_threads()).__name__
    return {"solved": solved, "measured": measured, "ratio": round(solved / measured, 2), "clock": clock}
