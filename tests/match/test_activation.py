"""Activations: what becomes text, what is carried, what is refused; compiled blocks equal eager, gradients too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from samoyeds_compile import Report
from tests.blocks import Block


def halves(z):
    return z.chunk(2, dim=-1)


def clamped(z):
    gate, up = halves(z)
    return F.silu(gate.clamp(max=1.0)) * up.clamp(min=-1.0, max=1.0)


def interleaved(z):
    gate, up = z[..., ::2], z[..., 1::2]
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


def in_fp32(z):
    gate, up = halves(z)
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def tanh_gelu(z):
    gate, up = z[:, :24], z[:, 24:]
    return F.gelu(gate, approximate="tanh") * up


class Learned(nn.Module):
    """An activation with a parameter of its own: no expression, but row-wise."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.randn(24))

    def forward(self, z):
        gate, up = z.split(24, dim=-1)
        return torch.where(gate > 0, gate * self.slope, gate.exp() - 1) * up


def normed(z):
    gate, up = halves(z)
    h = F.silu(gate) * up
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)


TEXT = {
    "swiglu": (None, True, "swiglu"),
    "clamped": (clamped, True, "silu(clamp(gate, None, 1.0)) * clamp(up, -1.0, 1.0)"),
    "interleaved": (interleaved, True, "(up + 1) * gate * sigmoid(gate * 1.702)"),
    "in_fp32": (in_fp32, True, "silu(to(gate, 'float32')) * to(up, 'float32')"),
    "tanh_gelu": (tanh_gelu, True, "geglu_tanh"),
    "up_first": (lambda z: halves(z)[0] * F.silu(halves(z)[1]), True, "gate * silu(up)"),
    "relu2": (lambda z: F.relu(z).square(), False, "relu2"),
    "mish_of_negative": (lambda z: F.mish(-z) * 2, False, "mish(-x) * 2"),
    "power": (lambda z: torch.pow(torch.relu(z), 2), False, "relu2"),
    "in_place": (lambda z: F.silu(z).mul_(2), False, "silu(x) * 2"),
}


@pytest.mark.parametrize("style", ["grouped", "gathered"])
@pytest.mark.parametrize("name", TEXT)
def test_becomes_text(name, style):
    activate, gated, text = TEXT[name]
    block = compare(Block(style, activate=activate, gated=gated))
    assert block.activation == text
    assert block.became == ("samoyeds::moe_experts",)


@pytest.mark.parametrize("style", ["grouped", "gathered"])
@pytest.mark.parametrize("activate", [Learned, lambda: normed], ids=["learned", "normed"])
def test_is_carried(activate, style):
    block = compare(Block(style, activate=activate()))
    assert block.activation == "carried subgraph"


ACROSS_ROWS = {
    "softmax over rows": lambda z: halves(z)[0].softmax(0) * halves(z)[1],
    "running sum": lambda z: halves(z)[0].cumsum(0) * halves(z)[1],
    "centred": lambda z: (halves(z)[0] - halves(z)[0].mean(0, keepdim=True)) * halves(z)[1],
    "flipped": lambda z: halves(z)[0].flip(0) * halves(z)[1],
    "whole mean": lambda z: halves(z)[0] * halves(z)[1].mean(),
}


@pytest.mark.parametrize("style", ["grouped", "gathered"])
@pytest.mark.parametrize("name", ACROSS_ROWS)
def test_looks_across_rows_and_is_refused(name, style):
    block = compare(Block(style, activate=ACROSS_ROWS[name]), rewritten=False)
    assert block.reason


@pytest.mark.parametrize("style", ["grouped", "gathered"])
def test_slices_of_aten(style):
    """They name axis and bounds instead of an index."""
    part = torch.ops.aten.slice.Tensor
    block = compare(Block(style, activate=lambda z: F.silu(part(z, 1, 0, 24)) * part(z, 1, 24)), rewritten=None)
    assert block.rewritten or "internal error" not in block.reason


def test_reads_foreign_rows_and_is_refused():
    rows = torch.randn(14, 24)
    block = compare(Block(activate=lambda z: halves(z)[0] * halves(z)[1] + rows), rewritten=False)
    assert "rows from outside" in block.reason


def compare(model, rewritten=True):
    """Compile on the eager base, without validation, and compare outputs and gradients; returns the block's entry."""
    x, report = torch.randn(7, 16, requires_grad=True), Report()
    options = {"base": "eager", "report": report, "validate": False}
    results = []
    for forward in (model, torch.compile(model, backend="samoyeds", options=options)):
        out = forward(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    (block,) = report.blocks
    assert rewritten in (block.rewritten, None), block.reason
    return block
