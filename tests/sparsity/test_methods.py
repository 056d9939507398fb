"""Methods of pruning, one by one: scores, second order, refinement, order of features."""

import pytest
import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import SparsityConfig, best_mask, by_rows, pack, validate
from samoyeds_compile.sparsity.install import packed
from samoyeds_compile.sparsity.layout import StorageLayout
from samoyeds_compile.sparsity.order import best_order, kept_share
from samoyeds_compile.sparsity.projections import Projection
from samoyeds_compile.sparsity.prune import METHODS, method_of, pruned_rows
from samoyeds_compile.sparsity.refine import refine
from samoyeds_compile.sparsity.scores import wanda
from samoyeds_compile.sparsity.second_order import inverse_factor, second_order

CONFIGS = [
    SparsityConfig(1, 1, 16),
    SparsityConfig(1, 2, 16),
    SparsityConfig(2, 4, 32, group=2),
    SparsityConfig(1, 2, 16, "none"),
]
ROWS, COLS = 24, 70  # ragged


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def correlated(tokens: int, features: int) -> Tensor:
    """Inputs with a few strong directions, unlike sizes, and a mean."""
    mixed = torch.randn(tokens, features // 4) @ torch.randn(features // 4, features)
    return (mixed + 0.3 * torch.randn(tokens, features) + 0.5 * torch.randn(features)) * (
        3 * torch.rand(features)
    ).exp2()


def output_error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    return float((x @ (weight - pruned).T).norm() / (x @ weight.T).norm())


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_each_method_is_better_than_the_one_before(config: SparsityConfig) -> None:
    weight, x = torch.randn(ROWS, COLS), correlated(600, COLS)
    by_size = weight * best_mask(weight.square(), config)
    by_norm = weight * best_mask(wanda(weight, x.square().mean(0).sqrt()).square(), config)
    by_update, mask = second_order(weight, x.T @ x, config)
    assert torch.equal(by_update != 0, mask)
    validate(by_update, config)
    errors = [output_error(weight, pruned, x) for pruned in (by_update, by_norm, by_size)]
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_second_order_without_correlations_is_wanda(config: SparsityConfig) -> None:
    """Then nothing that is kept can make up for what is pruned."""
    weight, sizes = torch.randn(ROWS, COLS), torch.rand(COLS) + 0.5
    pruned, mask = second_order(weight, sizes.square().diag(), config, damping=0.0)
    assert torch.equal(mask, best_mask(wanda(weight, sizes).square(), config))
    torch.testing.assert_close(pruned, weight * mask)


def test_second_order_update_is_the_least_squares_fit() -> None:
    """Row 0 loses its first vector of columns and keeps the second, which is to give what the first gave."""
    x = correlated(300, 32)
    weight = torch.randn(2, 32)
    weight[1] *= torch.tensor([100.0] * 16 + [0.0] * 16)
    pruned, mask = second_order(weight, x.T @ x, SparsityConfig(1, 2, 16, "none"), damping=1e-9)
    assert mask.int().tolist() == [[0] * 16 + [1] * 16, [1] * 16 + [0] * 16]
    first, second = x[:, :16].double(), x[:, 16:].double()
    fit = torch.linalg.lstsq(second, first @ weight[0, :16].double()).solution
    torch.testing.assert_close(pruned[0, 16:].double(), weight[0, 16:].double() + fit, rtol=1e-3, atol=1e-3)
    assert torch.equal(pruned[1], weight[1] * mask[1])


def test_inverse_factor() -> None:
    x = torch.randn(200, 12)
    hessian = x.T @ x
    upper = inverse_factor(hessian, damping=0.1)
    damped = hessian.double() + 0.1 * hessian.double().diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(upper.double().T @ upper.double(), damped.inverse(), rtol=1e-4, atol=1e-7)
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_second_order_with_few_tokens(tokens: int) -> None:
    """Fewer tokens than features, and features that are always 0: damping keeps it finite."""
    weight, x = torch.randn(ROWS, COLS), torch.randn(tokens, COLS)
    x[:, ::3] = 0
    pruned, mask = second_order(weight, x.T @ x, CONFIGS[1])
    assert bool(pruned.isfinite().all()) and float(mask.float().mean()) > 0.2
    with pytest.raises(SparsityError, match="hessian: is not positive definite"):
        second_order(weight, torch.full((COLS, COLS), float("nan")), CONFIGS[1])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_refinement(config: SparsityConfig) -> None:
    weight, x = torch.randn(ROWS, COLS), torch.randn(400, COLS) + torch.randn(COLS)  # independent, with a mean
    mean, square = x.mean(0), x.square().mean(0)
    mask = best_mask(wanda(weight, square.sqrt()).square(), config)
    before = mask.clone()
    refined = refine(weight, mask, mean, square, config)
    assert torch.equal(mask, before)
    validate(weight * refined, config)
    if config.inner == "none":
        assert torch.equal(refined, mask)
        return
    at_mean, at_mean_refined = (((weight * ~m) @ mean).abs() for m in (mask, refined))
    assert bool((at_mean_refined <= at_mean + 1e-5).all()) and float(at_mean_refined.sum()) < 0.6 * float(at_mean.sum())
    assert torch.equal(refined.sum(1), mask.sum(1))
    assert output_error(weight, weight * refined, x) < output_error(weight, weight * mask, x)


def test_refinement_is_one_swap_where_one_is_best() -> None:
    """The mean sees 1 pruned and -1 kept; swapping 3 and 2 would be better for the mean, worse for the variance."""
    weight = torch.tensor([[4.0, 3.0, 1.1, 1.0] + [0.0] * 12])
    mask = torch.tensor([[True, True, False, False] + [True, True, False, False] * 3])
    mean = torch.tensor([0.0, 0.0, 1.0, 0.0] + [0.0] * 12)
    low, high = mean.square() + 1e-3, mean.square() + 100.0
    swapped = refine(weight, mask, mean, low, SparsityConfig(1, 1, 16))
    assert swapped[0, :4].tolist() == [True, False, True, False]  # 3 is given up for 1.1, and 4 is kept
    assert torch.equal(refine(weight, mask, mean, high, SparsityConfig(1, 1, 16)), mask)


@pytest.mark.parametrize("matrices", [1, 2])
@pytest.mark.parametrize("features", [32, 64, 40])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_order_keeps_more(config: SparsityConfig, features: int, matrices: int) -> None:
    strength = torch.rand(features).square() * 3
    runs = 2 // matrices  # gate and up as one matrix, or apart
    ups = [torch.randn(runs * features, 24).square() * strength.repeat(runs)[:, None] for _ in range(matrices)]
    down = torch.randn(24, features).square() * strength
    order = best_order(ups, down, config)
    assert order.sort().values.tolist() == list(range(features))
    shares = [up / sum(u.sum() for u in ups) for up in ups], down / down.sum()
    identity = torch.arange(features)
    before, after = (kept_share(*shares, o, config) for o in (identity, order))
    assert after > before * 1.003
    if features % 32 == 0:  # trial swaps do more than sorting
        assert after > kept_share(*shares, best_order(ups, down, config, sweeps=0), config)


def test_order_where_all_are_alike_stays() -> None:
    order = best_order([torch.ones(64, 16)], torch.ones(16, 32), SparsityConfig(1, 2, 16))
    assert order.tolist() == list(range(32))


STORAGE = [{}, {"transposed": True}, {"interleaved": True, "runs": 2}, {"stacked": False}]


@pytest.mark.parametrize("storage", STORAGE, ids=lambda s: "-".join(s) or "stack")
@pytest.mark.parametrize("config", [*CONFIGS, SparsityConfig(1, 2, 16, group=5)], ids=str)
def test_a_few_rows_at_a_time(
    config: SparsityConfig, storage: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reordered, pruned and packed a few rows at a time: the same as all of it at once."""
    monkeypatch.setattr(by_rows, "VALUES", 8 * COLS)
    form = {"stacked": True} | storage
    matrices, owner = torch.randn(2 if form["stacked"] else 1, 38, COLS), nn.Module()
    stored = StorageLayout(form.get("transposed", False), form.get("interleaved", False)).to_stored(matrices)
    owner.weight = nn.Parameter(stored if form["stacked"] else stored[0])
    up = Projection("weight", owner, "weight", "up", **form)
    order = torch.randperm(38 // up.runs)
    made = packed(up, config)
    for expert in range(up.experts):
        matrix = by_rows.Matrix.of(up, expert, order)
        parts = list(pruned_rows(matrix, None, expert, config, METHODS["magnitude"], False))
        assert len(parts) > 3
        for part in parts:
            made.write(expert, part)
    moved = matrices[:, by_rows.runs_of(order, 38)]
    expected = pack(moved * best_mask(moved.square(), config), config)
    for name in ("values", "metadata", "selection"):
        ours, theirs = getattr(made.weight.packed, name), getattr(expected, name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs.view_as(ours))


def test_rows_of_runs() -> None:
    assert by_rows.runs_of(torch.tensor([1, 0]), 4).tolist() == [1, 0, 3, 2]


def test_method_of() -> None:
    assert method_of("magnitude", False, False) is METHODS["magnitude"]
    for arguments, reason in (
        (("wand", False, True), r"method: is 'wand'; pass one of magnitude, wanda"),
        (("wanda", False, False), r"calibration: is None, but method 'wanda' needs it"),
        (("magnitude", True, False), r"calibration: is None, but refine=True needs it"),
        (("second_order", True, True), r"refine: method 'second_order'"),
    ):
        with pytest.raises(SparsityError, match=reason):
            method_of(*arguments)
