"""The text of rewritten graphs, as reviewers see it. SAMOYEDS_ACCEPT=1 refreshes the ``.expected`` files."""

import os
from pathlib import Path

import pytest
import torch

from samoyeds_compile.backend import find_blocks, lower_blocks, rewrite_blocks
from samoyeds_compile.graph.values import read_graphs
from samoyeds_compile.match.driver import FAMILIES
from samoyeds_compile.report.model import GraphReport
from tests.blocks import Block

EXPECTED = Path(__file__).parent / "expected"


def text_of(gm):
    """One line a node: name, target, arguments."""
    lines = []
    for node in gm.graph.nodes:
        target = node.target if isinstance(node.target, str) else torch.typename(node.target) or node.target
        target = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else target
        lines.append(f"{node.op} {node.name} = {target}{node.args}{node.kwargs or ''}")
    return "\n".join(lines) + "\n"


def stages_of(block):
    """The graph of a block after each editing step."""
    texts = {}

    def backend(gm, example_inputs):
        rewrite_blocks(find_blocks(read_graphs(gm), FAMILIES, GraphReport("")))
        texts["rewrite"] = text_of(gm)
        lower_blocks(gm)
        texts["lower"] = text_of(gm)
        return gm.forward

    torch.compile(block, backend=backend, dynamic=True)(torch.randn(6, 16))
    return texts


def carried(z):
    gate, up = z.chunk(2, dim=-1)
    h = torch.sigmoid(gate) * up
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)


BLOCKS = {
    "grouped": lambda: Block("grouped"),
    "gathered_bias": lambda: Block("gathered", bias=True),
    "grouped_carried": lambda: Block("grouped", activate=carried),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_golden(name):
    for stage, text in stages_of(BLOCKS[name]()).items():
        path = EXPECTED / f"{name}.{stage}.expected"
        if os.environ.get("SAMOYEDS_ACCEPT"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{path.name} differs; SAMOYEDS_ACCEPT=1 accepts the new text"
