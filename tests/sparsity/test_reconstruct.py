"""`sparsify_(reconstruct=...)`: kept values are fitted to what the dense layer gave."""

import itertools

import pytest
import torch
from torch import nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, densify_, reconstruct, sparsify_, validate
from samoyeds_compile.sparsity.experts import find_blocks
from samoyeds_compile.sparsity.training import masked_parameters
from tests.sparsity.experts_models import OTHER_STACKS, STACKED, ListedModel, build, logits, state, unchanged
from tests.sparsity.test_sparsify import matrices

CONFIG = SparsityConfig(1, 2, 32)
STEPS = 30


def made(name: str):
    """A model, a call of it as calibration, and what it gives."""
    torch.manual_seed(0)
    if name != "list":
        model, inputs = build(name)
        return model, inputs, lambda: logits(model, inputs)
    model, x = ListedModel(), torch.randn(200, 16)
    return model, x, lambda: model(x).detach()


@pytest.mark.parametrize(("name", "permute"), list(itertools.product([*STACKED, *OTHER_STACKS, "list"], [False, True])))
def test_each_layer_comes_nearer(name: str, permute: bool) -> None:
    model, inputs, run = made(name)
    names = {p.name for block in find_blocks(model) for p in block.projections}
    others = {key: value for key, value in state(model).items() if key not in names and "bias" not in key}
    report = sparsify_(model, CONFIG, calibration=[inputs], reconstruct=STEPS, permute=permute, progress=False)
    assert all(0 < layer.error_after < 0.9 * layer.error_before for layer in report.layers)
    holders = {reconstruct.holder(block, model)[0] for block in find_blocks(model)}
    assert {layer.name for layer in report.layers} == holders
    assert all(isinstance(model.get_parameter(key), PackedTensor) for key in names)
    for block in find_blocks(model):
        for projection in block.projections:
            validate(matrices(projection), CONFIG)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in others.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "after reconstruction" in str(report) and len(report.to_dict()["layers"]) == len(report.layers)
    assert run().isfinite().all()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_model_comes_nearer(name: str) -> None:
    """The last layer is fitted on what the sparse ones before it give, so errors do not add up."""
    errors = []
    for steps in (0, STEPS):
        model, inputs, run = made(name)
        dense = run()
        sparsify_(model, CONFIG, calibration=[inputs], reconstruct=steps, progress=False)
        errors.append(float((run() - dense).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_the_fit_is_that_of_least_squares() -> None:
    """Of one expert's last projection, of which the layer's output is a linear function."""
    model, x, _ = made("list")
    name = "experts.2.down_proj.weight"
    with torch.no_grad():
        dense = model(x)
    report = sparsify_(
        model, CONFIG, calibration=[x], filter_fn=[name], reconstruct=600, trainable=True, progress=False
    )
    (masked,) = masked_parameters(model)
    zero = torch.zeros_like(masked.master)

    def output(weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.func.functional_call(model, {name: weight}, (x,)).double()

    wanted, places = dense.double() - output(zero), masked.mask.nonzero().tolist()
    basis = []
    for place in places:
        weight = zero.clone()
        weight[tuple(place)] = 1
        basis.append((output(weight) - output(zero)).flatten())
    matrix = torch.stack(basis, dim=1)
    best = matrix @ torch.linalg.lstsq(matrix, wanted.flatten().unsqueeze(1)).solution
    error = float((best.flatten() - wanted.flatten()).norm() / dense.double().norm())
    assert error * (1 - 1e-6) < report.layers[0].error_after < 1.0001 * error < 0.99 * report.layers[0].error_before


def test_masters_and_packed_weights_are_the_same() -> None:
    outputs = []
    for trainable in (False, True):
        model, inputs, run = made("gpt_oss")
        before = state(model)
        sparsify_(
            model, CONFIG, calibration=[inputs], reconstruct=STEPS, permute=True, trainable=trainable, progress=False
        )
        outputs.append(run())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for parameter in masked_parameters(model):  # what is pruned keeps its value, in the other order
        kept = before[parameter.name].flatten(1).sort().values[:, :1]
        assert parameter.master[~parameter.mask].abs().max() > 0 and kept.shape[0] == 8


def test_it_is_the_same_each_time_and_in_train_mode() -> None:
    weights = []
    for training in (False, False, True):
        model, inputs, _ = made("mixtral")
        for module in model.modules():
            if hasattr(module, "jitter_noise"):
                module.jitter_noise = 0.5
        model.train(training)
        sparsify_(model, CONFIG, calibration=[inputs], reconstruct=STEPS, progress=False)
        assert model.training == training
        densify_(model)
        weights.append(state(model))
    for other in weights[1:]:
        assert all(torch.equal(other[key], value) for key, value in weights[0].items())


def test_bfloat16() -> None:
    model, inputs = build("qwen3_moe", torch.bfloat16)
    report = sparsify_(model, CONFIG, calibration=[inputs], reconstruct=STEPS, progress=False)
    assert all(0 < layer.error_after < 0.9 * layer.error_before for layer in report.layers)


def test_what_gets_worse_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "RATE", 1e3)
    found = []
    for steps in (0, STEPS):
        model, inputs, run = made("mixtral")
        report = sparsify_(model, CONFIG, calibration=[inputs], reconstruct=steps, progress=False)
        found.append(run())
    assert torch.equal(*found) and all(layer.error_before == layer.error_after for layer in report.layers)


def test_experts_that_no_token_reaches_stay() -> None:
    model, _ = build("mixtral")
    other, _ = build("mixtral")
    inputs = {"input_ids": torch.tensor([[5]])}
    report = sparsify_(model, CONFIG, calibration=[inputs], reconstruct=STEPS, progress=False)
    sparsify_(other, CONFIG, calibration=[inputs], progress=False)
    for name, missed in report.unreached.items():
        assert torch.equal(
            model.get_parameter(name).to_dense()[list(missed)], other.get_parameter(name).to_dense()[list(missed)]
        )


class Counting(ListedModel):
    """Adds how often it was called."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        (ListedModel, {"reconstruct": -1}, "reconstruct: is -1"),
        (ListedModel, {"reconstruct": True}, "reconstruct: is True"),
        (ListedModel, {"calibration": None, "method": "magnitude"}, "calibration: is None, but reconstruct needs it"),
        (Counting, {}, "reconstruct: Counting gives something else when it is called again"),
    ],
)
def test_bad_arguments_change_nothing(kind: type[nn.Module], arguments: dict[str, object], reason: str) -> None:
    model = kind()
    before = state(model)
    with pytest.raises(SparsityError, match=reason):
        sparsify_(
            model, CONFIG, progress=False, **{"calibration": [torch.randn(20, 16)], "reconstruct": STEPS} | arguments
        )
    assert unchanged(model, before)
