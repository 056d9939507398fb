"""The ops by which ``fully_shard`` splits and gathers packed experts, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from samoyeds_compile import SparsityError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, best_mask

CONFIG = SparsityConfig(1, 2, 16)
POLICY = SimpleNamespace(param_dtype=None)


def packed(experts: int = 4) -> tuple[PackedTensor, Tensor]:
    weight = torch.randn(experts, 8, 32)
    dense = torch.where(torch.stack([best_mask(matrix.abs(), CONFIG) for matrix in weight]), weight, 0)
    return PackedTensor.from_dense(dense, CONFIG), dense


def ranks(count: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: count)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_gathered_are_the_whole(count: int) -> None:
    weight, dense = packed()
    shards = [torch.zeros_like(chunk.to_dense()) for chunk in weight.chunk(count)]
    assert [s.shape for s in shards] == [(4 // count, 8, 32)] * count
    parts = [c.fsdp_pre_all_gather(ranks(count), weight.shape, (), None, POLICY) for c in weight.chunk(count)]
    gathered = tuple(torch.cat(tensors) for tensors in zip(*(inner for inner, _ in parts), strict=True))
    whole, _ = weight.fsdp_post_all_gather(gathered, parts[0][1], torch.float32)
    assert torch.equal(whole.to_dense(), dense)
    assert weight.fsdp_post_all_gather(gathered, parts[0][1], torch.float32, out=whole) is None


def test_gathered_in_the_dtype_of_the_policy() -> None:
    weight, _ = packed()
    policy = SimpleNamespace(param_dtype=torch.bfloat16)
    (kept, *rest), _ = weight.fsdp_pre_all_gather(ranks(2), weight.shape, (), None, policy)
    assert kept.dtype == torch.bfloat16 and rest[0].shape == weight.metadata.shape


def test_seen_as_a_vector_it_still_knows_its_values() -> None:
    weight, dense = packed()
    vector = weight.view(-1)
    assert vector.shape == (dense.numel(),) and torch.equal(vector.to_dense(), dense.flatten())
    with pytest.raises(SparsityError, match="not known for packed weights"):
        vector + 1


def test_what_is_refused() -> None:
    weight, _ = packed(experts=3)
    with pytest.raises(SparsityError, match=r"3 experts cannot be shared by 2 ranks; pass .*ignored_params"):
        weight.fsdp_pre_all_gather(ranks(2), weight.shape, (), None, POLICY)
    with pytest.raises(SparsityError, match="only experts of a stack"):
        weight[0].chunk(2)
    with pytest.raises(SparsityError, match="stacks of experts of the same form"):
        weight.new_zeros(3, 8, 16)
    with pytest.raises(SparsityError, match="no other strides than its own"):
        weight.as_strided((3, 8, 32), (256, 1, 8))
