"""Packed experts on a CUDA device: the bits are those of the CPU, and compiled models compute what eager ones do."""

import copy

import pytest
import torch

from samoyeds_compile import PackedTensor, Report, SparsityConfig, densify_, sparsify_
from samoyeds_compile.sparsity import best_mask
from tests.gpu.models import mixtral

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = [SparsityConfig(1, 1, 32), SparsityConfig(1, 2, 32), SparsityConfig(1, 2, 128, group=16)]


def model():
    return mixtral().to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_packing_is_the_same_on_both_devices(config):
    weight = torch.randn(3, 96, 128, dtype=torch.bfloat16)
    pruned = weight * best_mask(weight.abs(), config)
    there, here = PackedTensor.from_dense(pruned.cuda(), config), PackedTensor.from_dense(pruned, config)
    assert torch.equal(there.to_dense().cpu(), here.to_dense())
    assert torch.equal(there.kept.cpu(), here.kept)
    assert torch.equal(here.to("cuda").to_dense().cpu(), pruned)


@pytest.mark.parametrize("method", ["magnitude", "router_wanda", "second_order"])
def test_sparsify_and_compile(method):
    packed, report = model(), Report()
    tokens = torch.randint(128, (2, 48), device="cuda")
    sparsify_(packed, CONFIGS[1], method=method, calibration=[tokens], progress=False)
    dense = copy.deepcopy(packed)
    densify_(dense)
    compiled = torch.compile(packed, backend="samoyeds", options={"report": report})
    with torch.no_grad():
        expected = dense(tokens).logits.float()
        for found in (packed(tokens), compiled(tokens)):
            scale = float(expected.abs().max())
            assert float((found.logits.float() - expected).abs().max()) <= 5e-2 * scale
    assert report.blocks and all(block.rewritten for block in report.blocks)


def test_packed_memory_on_the_device():
    found = model()
    weights = sum(p.nbytes for p in found.parameters() if p.dim() == 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    sparsify_(found, CONFIGS[1], method="magnitude", progress=False)
    saved = before - torch.cuda.memory_allocated()
    assert saved >= 0.65 * weights
