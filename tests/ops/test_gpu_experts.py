"""`samoyeds::experts_gpu` by CUDA kernels, which the emulator runs, on packed weights as checkpoints hold them."""

import pytest
import torch

from samoyeds_codegen.errors import UnsupportedSpecError
from samoyeds_codegen.gpu.device import Device
from samoyeds_compile import SparsityConfig
from samoyeds_compile.ops import gpu_call, gpu_experts, reference
from tests.codegen.cuda import emulated
from tests.ops.operands import double, operands
from tests.ops.test_sparse_experts import packed_operands

DEVICES = {"mma": Device("a", (8, 0), 2, 1e9, 1e12), "wgmma": Device("b", (9, 0), 2, 1e9, 1e12)}


@pytest.fixture
def emulator(monkeypatch):
    """Launches are emulated; gives a list of them."""
    seen = []

    def run(launches, device):
        for launch in launches:
            seen.append(launch.spec)
            emulated.run(launch)

    monkeypatch.setattr(gpu_call, "run", run)
    return seen


@pytest.mark.parametrize(
    ("kind", "layout", "config", "bias", "dtype"),
    [
        ("mma", "concatenated", SparsityConfig(1, 2, 32), True, torch.bfloat16),
        ("mma", "interleaved", SparsityConfig(2, 4, 64), True, torch.float16),
        ("mma", "none", SparsityConfig(1, 2, 32, group=3), False, torch.bfloat16),
        ("wgmma", "separate", SparsityConfig(1, 1, 32), True, torch.float16),
        ("wgmma", "concatenated", SparsityConfig(1, 2, 128, group=4), False, torch.bfloat16),
    ],
)
def test_packed(emulator, monkeypatch, kind, layout, config, bias, dtype) -> None:
    """Halves of one storage begin within a group that shares its choice; biases alternate, or are none."""
    monkeypatch.setattr(gpu_experts, "device_of", lambda device: DEVICES[kind])
    dense, packed = packed_operands(operands(1, 6, 2, 3, 40, 36, layout, "out_in", bias, dtype), config)
    with torch.no_grad():
        found = torch.ops.samoyeds.experts_gpu(*packed, dtype, None, kind)
    assert any(
        str(spec).startswith("up") and spec.wgmma == (kind == "wgmma") for spec in emulator if hasattr(spec, "wgmma")
    )
    expected = reference.moe_experts(*double(dense))
    assert float((found.double() - expected).norm() / expected.norm()) < 2e-2


def test_other_dtypes_of_routing_weights(emulator, monkeypatch) -> None:
    monkeypatch.setattr(gpu_experts, "device_of", lambda device: DEVICES["mma"])
    dense, packed = packed_operands(
        operands(1, 6, 2, 3, 40, 36, "concatenated", "out_in", True, torch.bfloat16), SparsityConfig(1, 2, 32)
    )
    packed[2] = packed[2].double()
    with torch.no_grad():
        found = torch.ops.samoyeds.experts_gpu(*packed, torch.bfloat16, torch.float64, "mma")
    expected = reference.moe_experts(*double(dense))
    assert found.dtype == torch.float64 and float((found - expected).norm() / expected.norm()) < 2e-2


def test_dense_weights_have_triton_kernels_only() -> None:
    args = operands(1, 6, 2, 3, 40, 36, "concatenated", "out_in", False, torch.bfloat16)
    with torch.no_grad(), pytest.raises(UnsupportedSpecError, match="other kinds"):
        torch.ops.samoyeds.experts_gpu(*args, torch.bfloat16, None, "mma")
