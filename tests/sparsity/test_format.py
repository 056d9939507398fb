"""The sparse format: optimal patterns, exact packing, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    _calculate_meta_reordering_scatter_offsets,
    sparse_semi_structured_from_dense_cutlass,
)

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import SparsityConfig, best_mask, pack, unpack, validate

CONFIGS = [
    SparsityConfig(n, m, vector, inner, group)
    for (n, m), vector, inner, group in itertools.product(
        [(1, 1), (1, 2), (2, 4), (4, 8), (3, 4)], [16, 32, 128], ["2:4", "none"], [1, 4]
    )
]


def pruned(weight: Tensor, config: SparsityConfig) -> Tensor:
    return weight * best_mask(weight.abs(), config)


@settings(max_examples=150, deadline=None)
@given(
    config=st.sampled_from(CONFIGS), experts=st.sampled_from([None, 1, 3]),
    rows=st.integers(1, 40), cols=st.integers(1, 150), transposed=st.booleans(), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_pack_and_back(config, experts, rows, cols, dtype, transposed, seed):
    """Unpacking gives the same bits, for ragged shapes, stacks and transposed storage as well."""
    generator = torch.Generator().manual_seed(seed)
    shape = ((cols, rows) if transposed else (rows, cols)) if experts is None else (
        (experts, cols, rows) if transposed else (experts, rows, cols)
    )  # fmt: skip
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight = weight.mT if transposed else weight
    weight = pruned(weight, config)
    packed = pack(weight, config)
    assert torch.equal(unpack(packed), weight)
    again = pack(unpack(packed), config)
    assert torch.equal(again.values, packed.values)
    assert packed.metadata is None or torch.equal(again.metadata, packed.metadata)
    assert packed.selection is None or torch.equal(again.selection, packed.selection)


@settings(max_examples=60, deadline=None)
@given(config=st.sampled_from(CONFIGS), rows=st.integers(1, 40), cols=st.integers(1, 150), seed=st.integers(0, 99))
def test_mask_has_the_pattern(config, rows, cols, seed):
    """Counts of kept values, straight from the definition."""
    mask = best_mask(torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)), config)
    for top, left in itertools.product(range(0, rows, config.m), range(0, cols, config.vector)):
        block = mask[top : top + config.m, left : left + config.vector]
        assert int(block.any(dim=1).sum()) <= config.n
        if config.inner == "2:4":
            assert all(int(part.sum(1).max()) <= 2 for part in block.split(4, dim=1))
    for top, left in itertools.product(range(0, rows, config.m * config.group), range(0, cols, config.vector)):
        blocks = mask[top : top + config.m * config.group, left : left + config.vector].split(config.m)
        whole = [b.any(dim=1) for b in blocks if b.shape[0] == config.m]
        assert all(torch.equal(whole[0], other) for other in whole[1:])


def brute_force(scores: Tensor, config: SparsityConfig) -> float:
    """The largest sum of scores that any mask of the pattern keeps, in one group of blocks and one vector."""
    best = 0.0
    for kept in itertools.combinations(range(config.m), config.n):
        total = 0.0
        for row in range(scores.shape[0]):
            if row % config.m not in kept:
                continue
            for four in scores[row].split(4):
                pairs = [sum(c) for c in itertools.combinations(four.tolist(), min(2, len(four)))]
                total += max(pairs) if config.inner == "2:4" else float(four.sum())
        best = max(best, total)
    return best


@pytest.mark.parametrize("inner", ["2:4", "none"])
@pytest.mark.parametrize(
    ("n", "m", "group"), [(1, 1, 1), (1, 2, 1), (2, 4, 1), (1, 2, 3), (2, 4, 2), (3, 5, 2), (4, 8, 1)]
)
@pytest.mark.parametrize("ragged", [0, 1, 3])
def test_solver_is_optimal(n, m, group, inner, ragged):
    config = SparsityConfig(n, m, 16, inner, group)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        rows, cols = max(m * group - ragged, 1), 16 - ragged
        scores = torch.randint(0, 9, (rows, cols), generator=generator).double()  # many equal ones
        mask = best_mask(scores, config)
        assert float(scores[mask].sum()) == brute_force(scores, config)


def test_equal_scores_keep_the_first() -> None:
    mask = best_mask(torch.ones(2, 16), SparsityConfig(1, 2, 16))
    assert mask.int().tolist() == [[1, 1, 0, 0] * 4, [0] * 16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_as_torch_stores_2_4(dtype: torch.dtype) -> None:
    """The inner pattern has PyTorch's values and bits, apart from the order that its kernels want."""
    weight = pruned(torch.randn(64, 128), SparsityConfig(1, 1, 32)).to(dtype)
    values, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    packed = pack(weight, SparsityConfig(1, 1, 32))
    assert torch.equal(packed.values, values)
    rows, words = packed.metadata.shape
    places = _calculate_meta_reordering_scatter_offsets(rows, words, metadata.dtype, metadata.device)
    assert torch.equal(metadata.view(-1)[places], packed.metadata.view(-1))


@pytest.mark.parametrize(("config", "share"), [(SparsityConfig(1, 2, 32), 0.30), (SparsityConfig(1, 1, 32), 0.57)])
def test_bytes(config: SparsityConfig, share: float) -> None:
    weight = pruned(torch.randn(4, 256, 512), config).bfloat16()
    assert pack(weight, config).nbytes <= share * weight.nbytes


def test_padding_is_not_stored_as_values() -> None:
    """A matrix as ragged as can be: one value."""
    packed = pack(torch.tensor([[3.0]]), SparsityConfig(2, 4, 64, group=2))
    assert torch.equal(unpack(packed), torch.tensor([[3.0]]))
    assert packed.values.shape == (4, 32) and packed.selection.shape == (2, 1)


def test_values_that_are_no_numbers_survive() -> None:
    weight = torch.zeros(2, 16)
    weight[1, 3], weight[1, 5] = float("nan"), float("inf")
    assert torch.equal(unpack(pack(weight, SparsityConfig(1, 2, 16))).isnan(), weight.isnan())


@pytest.mark.parametrize(
    ("at", "config"),
    [((1, 0, 2), SparsityConfig(1, 1, 16)), ((1, 1, 4), SparsityConfig(1, 2, 16, "none"))],
    ids=["three of four", "a second sub-row"],
)
def test_violation_is_named(at: tuple[int, ...], config: SparsityConfig) -> None:
    weight = torch.zeros(2, 2, 16)
    weight[1, 0, :2] = 1.0
    weight[at] = 1.0
    for check in (validate, pack):
        with pytest.raises(SparsityError, match=r"layers\.0\.w1: the value at \[1, \d, \d\] is one too many") as raised:
            check(weight, config, "layers.0.w1")
        assert str(list(at)) in str(raised.value) and str(config) in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [{"n": 0}, {"n": 3}, {"m": 17, "n": 1}, {"m": 2.0}, {"n": True}, {"vector": 24}, {"inner": "1:4"}, {"group": 0}],
    ids=str,
)
def test_no_such_pattern(arguments: dict[str, object]) -> None:
    with pytest.raises(SparsityError, match=f"SparsityConfig: {next(iter(arguments))} is .*; pass"):
        SparsityConfig(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "scores", [-torch.ones(2, 16), torch.full((2, 16), float("nan")), torch.ones(16), torch.ones(2, 16).int()]
)
def test_no_scores(scores: Tensor) -> None:
    with pytest.raises(SparsityError, match="scores: "):
        best_mask(scores, SparsityConfig())
