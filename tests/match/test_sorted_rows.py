"""Experts over rows sorted and counted elsewhere, as in torchtitan's ``GroupedExperts``."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from samoyeds_compile import Report

E, H, W = 4, 16, 24


class Experts(nn.Module):
    """``form`` is what stands between the products."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        wide = 2 * W if form == "packed" else W
        self.form, self.norm = form, nn.RMSNorm(W, dtype=torch.bfloat16)
        self.w1, self.w3 = (nn.Parameter((torch.randn(E, n, H) * 0.3).to(dtype)) for n in (wide, W))
        self.w2 = nn.Parameter((torch.randn(E, H, W) * 0.3).to(dtype))

    def forward(self, x_RH: Tensor, counts_E: Tensor) -> Tensor:
        offsets_E = torch.cumsum(counts_E, dim=0, dtype=torch.int32)

        def product(rows: Tensor, weight: Tensor) -> Tensor:
            return torch._grouped_mm(rows.bfloat16(), weight.bfloat16().transpose(-2, -1), offs=offsets_E)

        z = product(x_RH, self.w1)
        if self.form == "gated":
            h = silu(z) * product(x_RH, self.w3)
        elif self.form == "other rows":
            h = silu(z) * product(x_RH + 1, self.w3)
        elif self.form == "packed":
            gate, up = z.chunk(2, dim=-1)
            h = silu(gate) * up
        else:
            h = {"plain": gelu, "norm": self.norm, "across": lambda z: z + z.sum(0)}[self.form](z)
        return product(h, self.w2).type_as(x_RH)


def compiled(experts: nn.Module) -> tuple[nn.Module, Report]:
    report = Report()
    options = {"base": "aot_eager", "report": report}
    return torch.compile(experts, backend="samoyeds", fullgraph=True, dynamic=True, options=options), report


def assert_equal(forward: nn.Module, experts: nn.Module, counts: tuple[int, ...]) -> None:
    x, counts_E = torch.randn(sum(counts), H, requires_grad=True), torch.tensor(counts)
    inputs = [
        x,
        *(p for n, p in experts.named_parameters() if n in ("w1", "w2") or (experts.form, n) == ("gated", "w3")),
    ]
    runs = []
    for function in (forward, experts):
        out = function(x, counts_E)
        runs.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * (1 + float(expected.detach().abs().max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["gated", "plain", "packed"])
def test_rewritten_and_equal(form: str, dtype: torch.dtype) -> None:
    experts = Experts(form, dtype)
    forward, report = compiled(experts)
    for counts in ((3, 0, 2, 4), (0, 0, 0, 7), (1, 1, 1, 1)):
        assert_equal(forward, experts, counts)
    assert [(block.family, block.rewritten) for block in report.blocks] == [("sorted_rows", True)]
    assert len(report.graphs) == 1


@pytest.mark.parametrize(
    ("form", "reason"),
    [("other rows", "the first projections read different rows"), ("norm", "not known to be elementwise"),
     ("across", "not known to be elementwise")],
)  # fmt: skip
def test_left_alone(form: str, reason: str) -> None:
    experts = Experts(form)
    forward, report = compiled(experts)
    x, counts = torch.randn(9, H), torch.tensor([3, 0, 2, 4])
    assert torch.equal(forward(x, counts), experts(x, counts))
    (block,) = report.blocks
    assert not block.rewritten and reason in block.reason
