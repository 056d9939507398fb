"""The parts of the quality study: patterns of others, training that holds masks, the table."""

import itertools

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks.quality.oneshot import masked, peer_masks, pruned, reconstructed
from benchmarks.quality.peers import Unstructured, Venom
from benchmarks.quality.recover import recovered_peer
from benchmarks.quality.study import Study
from benchmarks.quality.summary import summary, table
from samoyeds_compile import SparsityConfig
from samoyeds_compile.sparsity import validate


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=4, **sizes)).eval()


@pytest.fixture
def calibration():
    return [torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))]


def best_by_trying(block: torch.Tensor) -> float:
    """What the best V:2:M mask of one block [V, M] keeps."""
    choices = itertools.combinations(range(block.shape[1]), 4)
    return max(float(block[:, list(chosen)].topk(2, dim=1).values.sum()) for chosen in choices)


def test_venom_is_optimal_and_has_the_pattern() -> None:
    scores = torch.rand(32, 24, generator=torch.Generator().manual_seed(0))
    mask = Venom(16).mask(scores)
    blocks = [(s, m) for s, m in zip(blocks_of(scores), blocks_of(mask), strict=True)]
    for block, kept in blocks:
        assert (kept.sum(1) == 2).all() and kept.any(0).sum() <= 4
        assert float(block[kept].sum()) == pytest.approx(best_by_trying(block))


def blocks_of(matrix: torch.Tensor) -> list[torch.Tensor]:
    return [block for rows in matrix.split(16) for block in rows.split(8, dim=1)]


def test_unstructured_keeps_the_largest() -> None:
    scores = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    mask = Unstructured(0.25).mask(scores)
    assert mask.sum() == 24 and scores[mask].min() >= scores[~mask].max()


def test_pruned_is_a_dense_copy_with_the_pattern(model, calibration) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = pruned(model, SparsityConfig(1, 2, 16), "router_wanda", calibration, permute=False)
    for name, parameter in found.named_parameters():
        if ".experts." in name:
            assert 0.2 < float((parameter != 0).float().mean()) <= 0.25
            validate(parameter, SparsityConfig(1, 2, 16), name)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", ["magnitude", "router_wanda"])
def test_peers_keep_their_masks_in_training(model, calibration, method) -> None:
    masks = peer_masks(model, Venom(16), method, calibration)
    assert all(float(mask.float().mean()) == 0.25 for mask in masks.values())
    before = masked(model, masks)
    found = recovered_peer(model, masks, [torch.randint(50, (2, 16)) for _ in range(3)])
    for name, mask in masks.items():
        after = found.get_parameter(name)
        assert not after[~mask].any()
        assert not torch.equal(after, before.get_parameter(name))


def row(when: str, pattern: str, perplexity: float) -> dict:
    facts = {"when": when, "pattern": pattern, "method": "m", "permute": False, "training": "", "distill": False}
    return {"name": f"{when} {pattern}", **facts, "perplexity": perplexity}


def test_each_row_is_compared_with_the_dense_model_of_its_seed_and_its_steps() -> None:
    first, second = (10.0, 11.0, 8.0, 8.2), (20.0, 24.0, 16.0, 16.0)
    names = list(itertools.product(("one-shot", "recovered"), ("dense", "a")))
    seeds = [[row(*name, value) for name, value in zip(names, values, strict=True)] for values in (first, second)]
    found = {(r["when"], r["pattern"]): r for r in summary(seeds)}
    assert found["one-shot", "a"]["above_dense_percent"] == [10.0, 20.0]
    assert found["one-shot", "a"]["mean_percent"] == 15.0
    assert found["recovered", "a"]["above_dense_percent"] == [2.5, 0.0]
    assert "| one-shot | a | m | 17.50 | +15.0 % (+10.0 to +20.0) |" in table(list(found.values()))


def test_peers_are_reconstructed_within_their_masks(model, calibration) -> None:
    masks = peer_masks(model, Unstructured(0.25), "magnitude", calibration)
    plain, fitted = masked(model, masks), reconstructed(model, masks, calibration, 20)
    with torch.no_grad():
        dense, *others = (m(calibration[0]).logits for m in (model, plain, fitted))
    assert float((others[1] - dense).norm()) < 0.9 * float((others[0] - dense).norm())
    for name, mask in masks.items():
        assert not fitted.get_parameter(name).detach()[~mask].any()


def test_study_at_a_plateau(calibration) -> None:
    """Every arm is trained on the same batches, is measured, and is compared with the dense model after them."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=4, **sizes)
    model = MixtralForCausalLM(config).eval()
    unseen = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(2))
    batches = [torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    study = Study(model, unseen, calibration, batches, calibration)
    (first, *rest) = study.rows_at_plateau(set())
    assert (first["pattern"], rest[0]["pattern"]) == ("dense at the start", "dense")
    assert {row["pattern"] for row in rest[1:]} == {"1:2:32+2:4", "VENOM 64:2:8", "unstructured 75%"}
    assert [row["distill"] for row in rest[1:4]] == [True, False, False]
    assert all(row["name"] != first["name"] for row in study.rows_at_plateau({first["name"]}))
    found = summary([[row("one-shot", "dense", 1.0), first, *rest]])
    assert found[2]["above_dense_percent"] == [0.0] and found[1]["above_dense_percent"] != [0.0]
