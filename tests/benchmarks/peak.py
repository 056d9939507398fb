"""Peaks of calls of one block, in a process of its own: ``python -m tests.benchmarks.peak DTYPE PATTERN ...``."""

import json
import sys
from dataclasses import asdict

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from benchmarks.common import DTYPES
from benchmarks.cpu.peak import peak_of
from benchmarks.cpu.shapes import Shape, build

WIDTH = 1024
SHAPE = Shape("", Qwen3MoeSparseMoeBlock, Qwen3MoeConfig(
    hidden_size=128, moe_intermediate_size=WIDTH, num_experts=8, num_experts_per_tok=4))  # fmt: skip


if __name__ == "__main__":
    dtype, *patterns = sys.argv[1:]
    with torch.no_grad():
        blocks = build(SHAPE, DTYPES[dtype], patterns)
        x = torch.randn(1, 512, 128).to(DTYPES[dtype])
        peaks = {name: peak_of(blocks.sparse.get(name, blocks.dense), x, WIDTH) for name in patterns}
    print(json.dumps({name: {**asdict(peak), "holds": peak.holds} for name, peak in peaks.items()}))
