"""Generated unpacking against PyTorch's, bit by bit, and products that go through it."""

import os

import pytest
import torch

from samoyeds_codegen.cpp.unpack import UnpackKernel, UnpackSpec
from samoyeds_compile import SparsityConfig
from samoyeds_compile.ops import packed as packed_ops
from samoyeds_compile.sparsity import best_mask, pack, unpack
from samoyeds_compile.sparsity.pack import PackedWeight
from samoyeds_compile.sparsity.strips import fits, to_strips
from samoyeds_compile.sparsity.tensor import PackedTensor

FLAGS = tuple(os.environ.get("SAMOYEDS_TEST_FLAGS", "").split())
PATTERNS = [
    SparsityConfig(1, 1, 16), SparsityConfig(1, 2, 32), SparsityConfig(2, 4, 64), SparsityConfig(1, 2, 32, group=16),
    SparsityConfig(3, 5, 16), SparsityConfig(1, 4, 128, inner="none"), SparsityConfig(2, 16, 32, group=3),
]  # fmt: skip
SHAPES = ((3, 64, 128), (2, 33, 50), (1, 7, 9), (96, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sparse(config: SparsityConfig, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (weight * best_mask(weight.abs(), config)).to(dtype)


def unpacked(stored: PackedWeight, strips: bool) -> torch.Tensor:
    c, values = stored.config, stored.values
    spec = UnpackSpec(values.element_size(), c.n, c.m, c.vector, c.group, c.inner == "2:4", strips)
    out = torch.full((*values.shape[:-2], *stored.shape), float("nan"), dtype=values.dtype)
    UnpackKernel(spec, FLAGS)(values, stored.metadata, stored.selection, out)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", PATTERNS, ids=str)
def test_ragged(config, shape):
    for dtype in DTYPES:
        weight = sparse(config, shape, dtype)
        stored = pack(weight, config)
        assert torch.equal(unpacked(stored, strips=False), weight) and torch.equal(unpack(stored), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [c for c in PATTERNS if fits(128, 128, c, torch.float32)], ids=str)
def test_strips(config, dtype):
    weight = sparse(config, (2, 128, 256), dtype)
    assert torch.equal(unpacked(to_strips(pack(weight, config)), strips=True), weight)


def test_damaged_storage_stays_in_bounds():
    config = SparsityConfig(1, 2, 32)
    stored = pack(sparse(config, (2, 64, 64)), config)
    stored.selection.fill_(255), stored.metadata.fill_(-1)
    assert torch.isfinite(unpacked(stored, strips=False)).all()


@pytest.mark.parametrize("in_out", [False, True], ids=["forward", "rows"])
@pytest.mark.parametrize("shape", [(64, 128), (48, 50)], ids=str)
def test_products_with_and_without_it(monkeypatch, shape, in_out):
    """An expert without rows, rows of nobody; the same without a compiler."""
    config = SparsityConfig(1, 2, 32)
    weight = PackedTensor.from_dense(sparse(config, (4, *shape)), config)
    x = torch.randn(40, shape[0] if in_out else shape[1])
    ends = torch.tensor([9, 9, 30, 36], dtype=torch.int32)
    product = torch.ops.samoyeds.expert_linear
    expected = product(x.double(), [weight.to_dense().double()], ends, in_out)
    found = product(x, [weight], ends, in_out)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(packed_ops, "_kernel", lambda *_: None)
    torch.testing.assert_close(product(x, [weight], ends, in_out), found)
