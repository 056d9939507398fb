"""Adapters of peft: over masked weights, where masks survive the merge, and over packed ones, which stay packed."""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, densify_, sparsify_, validate
from samoyeds_compile.sparsity.training import SparseTraining, dense_masters, masked_parameters
from tests.models import families
from tests.sparsity.experts_models import build, logits

CONFIG = SparsityConfig(1, 2, 32)
EXPERTS = {
    "switch_transformers": {"target_modules": ["q", "v", "wi", "wo"]},
    "mixtral": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
"""Switch has a list of experts of ``nn.Linear``, Mixtral stacks."""


def adapted(model: nn.Module, **targets: object) -> nn.Module:
    torch.manual_seed(3)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **targets))


def train(model: nn.Module, inputs: dict[str, Tensor], training: SparseTraining | None = None, steps: int = 4):
    """Losses, of the probe that tests of families use."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learned, lr=1e-2), []
    for _ in range(steps):
        loss = families.loss_of(model(**inputs))
        loss.backward()
        if training is not None:
            training.before_step()
        optimizer.step()
        if training is not None:
            training.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return losses


def deltas(model: nn.Module) -> dict[str, Tensor]:
    """What each adapter adds to the weight of its linear layer, by name in the model without adapters."""
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    return {
        f"{name}.weight": 2.0 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(("name", "method"), [("switch_transformers", "fixed"), ("mixtral", "sr_ste")])
def test_masks_survive_a_merge(name: str, method: str) -> None:
    """Adapters on attention and on experts of a list; stacks of experts are trained beside them."""
    model, inputs = build(name)
    sparsify_(model, CONFIG, method="magnitude", trainable=True, progress=False)
    lora = adapted(model, target_modules=EXPERTS[name]["target_modules"])
    of_experts = {key for key in deltas(lora) if "expert" in key}
    assert bool(of_experts) == (name == "switch_transformers")
    for parameter in masked_parameters(lora):
        parameter.master.requires_grad_(not of_experts)
    training = SparseTraining(CONFIG, method=method)
    training.attach(lora)
    train(lora, inputs, training)
    before = {m.name.removeprefix("base_model.model."): m for m in masked_parameters(lora)}
    kept = {key.replace(".base_layer", ""): (m.master.clone(), m.mask.clone()) for key, m in before.items()}
    added = deltas(lora)
    with dense_masters(lora):
        merged = lora.merge_and_unload()
    assert merged is model and {m.name for m in masked_parameters(model)} == kept.keys()
    for parameter in masked_parameters(model):
        master, mask = kept[parameter.name]
        expected = master + added.get(parameter.name, 0)
        torch.testing.assert_close(parameter.master, expected)
        computed = getattr(parameter.module, parameter.leaf)
        assert torch.equal(parameter.mask, mask) and not computed[~mask].any() and bool(computed.any())
    assert not of_experts or any(bool(added[key].any()) for key in of_experts)  # no token reaches some of them
    expected = logits(model, inputs)
    training.finish()
    assert torch.equal(logits(model, inputs), expected)
    names = [p.name for p in sparsify_(model, CONFIG, method="magnitude", progress=False).parameters]
    assert names and kept.keys() == set(names)
    for key in names:
        validate(model.get_parameter(key).to_dense(), CONFIG)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_masked_stacks_cannot_be_parametrized() -> None:
    """What peft does to a stack in each forward: refused before the parameter is gone."""
    model, inputs = build("mixtral")
    sparsify_(model, CONFIG, method="magnitude", trainable=True, progress=False)
    expected, masters = logits(model, inputs), [m.master for m in masked_parameters(model)]
    lora = adapted(model, **EXPERTS["mixtral"])
    with pytest.raises(SparsityError, match=r"down_proj: has a mask, .*parametrized.*train adapters over packed"):
        lora(**inputs)
    model = lora.unload()
    assert all(m.master is master for m, master in zip(masked_parameters(model), masters, strict=True))
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("name", EXPERTS)
def test_adapters_over_packed_experts(name: str) -> None:
    """As over the dense pruned weights, step by step; the packed ones are frozen and stay as they are."""
    model, inputs = build(name)
    sparsify_(model, CONFIG, method="magnitude", progress=False)
    dense = copy.deepcopy(model)
    densify_(dense)
    lora, reference = adapted(model, **EXPERTS[name]), adapted(dense, **EXPERTS[name])
    packed = {key: p.to_dense() for key, p in lora.named_parameters() if isinstance(p, PackedTensor)}
    assert packed and {key for key, p in lora.named_parameters() if p.requires_grad} == {
        key for key, _ in lora.named_parameters() if "lora_" in key
    }
    assert train(lora, inputs) == pytest.approx(train(reference, inputs), rel=1e-4)
    found = logits(lora, inputs)
    torch.testing.assert_close(found, logits(reference, inputs), rtol=1e-3, atol=1e-4)
    for key, weight in packed.items():
        assert isinstance(lora.get_parameter(key), PackedTensor)
        assert torch.equal(lora.get_parameter(key).to_dense(), weight)
    with pytest.raises(SparsityError, match=r"PackedTensor: aten::add_ .*densify_"):
        copy.deepcopy(lora).merge_and_unload()  # a packed weight has no room for what an adapter adds
    assert densify_(lora) == len(packed)
    torch.testing.assert_close(logits(lora.merge_and_unload(), inputs), found, rtol=1e-3, atol=1e-4)
