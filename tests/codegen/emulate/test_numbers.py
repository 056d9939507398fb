"""16-bit floats of the emulator are those of torch, bit for bit."""

import pytest
import torch

from samoyeds_codegen import emulate
from samoyeds_codegen.emulate import Output

TEXT = """
struct P { const __half* half; const __nv_bfloat16* brain; const float* x; float* wide; uint16_t* narrow; int n; };
__global__ void k(P p) {
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    p.wide[i] = __half2float(p.half[i]);
    p.wide[p.n + i] = __bfloat162float(p.brain[i]);
    p.narrow[i] = __float2half(p.x[i]).bits;
    p.narrow[p.n + i] = __float2bfloat16(p.x[i]).bits;
  }
}
"""
COUNT = 1 << 16


def convert(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All 16-bit floats as floats, and ``x`` in both 16-bit kinds, as bits."""
    bits = torch.arange(COUNT, dtype=torch.int32).to(torch.int16)
    wide, narrow = torch.empty(2, COUNT), torch.empty(2, COUNT, dtype=torch.int16)
    arguments = [bits.view(torch.float16), bits.view(torch.bfloat16), x, Output(wide), Output(narrow), COUNT]
    emulate.run(TEXT, "k", (1,), (64,), 0, arguments)
    return wide, narrow


def test_to_float() -> None:
    bits = torch.arange(COUNT, dtype=torch.int32).to(torch.int16)
    wide, _ = convert(torch.zeros(COUNT))
    for found, dtype in zip(wide, (torch.float16, torch.bfloat16), strict=True):
        assert torch.equal(found.nan_to_num(nan=1e30), bits.view(dtype).float().nan_to_num(nan=1e30))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e5, 1e38])
def test_from_float(scale: float) -> None:
    x = torch.randn(COUNT) * scale
    halves = torch.arange(COUNT // 2, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x[: COUNT // 2] = (halves + halves.roll(-1)) / 2  # ties, and numbers around the largest and the smallest
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    x = x.nan_to_num(nan=3.0, posinf=float("inf"), neginf=-float("inf"))
    _, narrow = convert(x)
    for found, dtype in zip(narrow, (torch.float16, torch.bfloat16), strict=True):
        assert torch.equal(found, x.to(dtype).view(torch.int16))
