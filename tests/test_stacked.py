"""Blocks right behind one another, with nothing in between."""

import pytest
import torch
from torch import nn

from samoyeds_compile import Report
from tests.blocks import Block


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("styles", [("grouped", "grouped"), ("grouped", "gathered"), ("gathered", "grouped")])
def test_output_of_one_block_is_the_input_of_the_next(styles, train):
    model, x = nn.Sequential(*(Block(style, bias=i == 0) for i, style in enumerate(styles))), torch.randn(6, 16)
    report = Report()
    with torch.set_grad_enabled(train):
        compiled = torch.compile(model, backend="samoyeds", options={"base": "eager", "report": report})(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-4)
    assert report.graphs[0].problem is None
    assert len(report.rewritten) == 2
