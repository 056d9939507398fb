"""`sparsify_` and `densify_` on models of transformers and on experts in a list."""

import copy
import itertools
import json

import pytest
import torch
from torch import nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, best_mask, densify_, job, sparsify_, validate
from samoyeds_compile.sparsity.calibration import collect
from samoyeds_compile.sparsity.experts import find_blocks
from samoyeds_compile.sparsity.stats import Wanted
from samoyeds_compile.sparsity.training import SparseTraining, masked_parameters, prepare
from tests.models import families
from tests.sparsity.experts_models import OTHER_STACKS, STACKED, ListedModel, Mixing, build, logits, state, unchanged

CONFIG = SparsityConfig(1, 2, 32)
ARGUMENTS = [
    {"method": "magnitude"},
    {"method": "wanda"},
    {},
    {"refine": True},
    {"method": "second_order"},
    {"permute": True},
    {"method": "second_order", "permute": True},
]


def matrices(projection):
    """[E, rows, cols] of a projection, packed or not; written apart from how the package reads it."""
    stored = projection.parameter
    stored = stored.to_dense() if isinstance(stored, PackedTensor) else stored.detach()
    stored = stored.view(8, -1, stored.shape[-1]) if projection.flat else stored
    stored = stored if projection.stacked else stored[None]
    stored = stored.mT if projection.transposed else stored
    return torch.cat([stored[:, ::2], stored[:, 1::2]], dim=1) if projection.interleaved else stored


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*itertools.product(STACKED, ARGUMENTS), *itertools.product(OTHER_STACKS, [{"refine": True}, ARGUMENTS[-1]])],
    ids=lambda a: a if isinstance(a, str) else "-".join(map(str, a.values())) or "default",
)
def test_model_of_transformers(name: str, arguments: dict[str, object]) -> None:
    model, inputs = build(name)
    names = {p.name for block in find_blocks(model) for p in block.projections}
    before = state(model)
    report = sparsify_(model, CONFIG, calibration=[inputs], progress=False, **arguments)
    assert {p.name for p in report.parameters} == names
    for name_, parameter in model.named_parameters():
        assert isinstance(parameter, PackedTensor) == (name_ in names)
        if not arguments.get("permute") and name_ not in names:
            assert torch.equal(parameter, before[name_])
    for block in find_blocks(model):
        for projection in block.projections:
            validate(matrices(projection), CONFIG)
    for p in report.parameters:
        assert 0.25 < p.kept_energy < 1 and 0 < p.relative_error < 1
        assert p.bytes_before == before[p.name].nbytes and p.bytes_after == model.get_parameter(p.name).packed_nbytes
    packed = logits(model, inputs)
    assert densify_(model) == len(names) and densify_(model) == 0
    assert not any(isinstance(parameter, PackedTensor) for parameter in model.parameters())
    torch.testing.assert_close(packed, logits(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "router_wanda"])
@pytest.mark.parametrize("name", [*STACKED, *OTHER_STACKS])
def test_masks_are_what_the_method_says(name: str, method: str) -> None:
    model, inputs = build(name)
    blocks = find_blocks(model)
    stats = collect(model, blocks, [inputs], Wanted(routed=method == "router_wanda"))
    expected = {}
    for projection in (p for block in blocks for p in block.projections):
        weight = matrices(projection)
        found = stats[projection.name]
        reached = (found.count > 0).view(-1, 1, 1)
        norms = torch.where(reached, found.squares.sqrt().unsqueeze(1), 1.0) if method != "magnitude" else 1.0
        expected[projection.name] = weight * best_mask((weight.abs() * norms).double().square(), CONFIG)
    sparsify_(model, CONFIG, method=method, calibration=[inputs], progress=False)
    for projection in (p for block in find_blocks(model) for p in block.projections):
        assert torch.equal(matrices(projection), expected[projection.name])


def test_error_falls_from_method_to_method() -> None:
    """On the calibration tokens, with features of unlike sizes; permutation keeps more of each score."""
    reports = {}
    for arguments in ARGUMENTS:
        torch.manual_seed(0)
        model, x = ListedModel(width=32, inner=64), torch.randn(800, 8) @ torch.randn(8, 32)
        x = (x + 0.3 * torch.randn(800, 32)) * (3 * torch.rand(32)).exp2()
        report = sparsify_(model, CONFIG, calibration=list(x.split(200)), progress=False, **arguments)
        reports[tuple(arguments.items())] = report
    magnitude, wanda, default, _, second, permuted, _ = reports.values()
    for parameters in zip(second.parameters, wanda.parameters, magnitude.parameters, strict=True):
        errors = [p.relative_error for p in parameters]
        assert errors[0] < 0.95 * errors[1]
        if "down" not in parameters[0].name:  # what goes into down here has features of like sizes
            assert errors[1] < errors[2]
    assert permuted.kept_energy > 1.02 * default.kept_energy


@pytest.mark.parametrize("name", [*STACKED, *OTHER_STACKS, "list"])
def test_order_of_features_does_not_change_the_function(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pattern that keeps everything, and a made-up order: weights move, each result is the same sum."""
    orders = []

    def made_up(ups, down, config):
        orders.append(torch.randperm(down.shape[1], generator=torch.Generator().manual_seed(len(orders))))
        return orders[-1]

    monkeypatch.setattr(job, "best_order", made_up)
    if name == "list":
        torch.manual_seed(0)
        model, inputs = ListedModel().double(), {"x": torch.randn(40, 16).double()}
        run = lambda: model(**inputs).detach()  # noqa: E731
    else:
        model, inputs = build(name, torch.float64)
        if name in STACKED:
            model.set_experts_implementation("eager")  # grouped products do not take float64
        run = lambda: logits(model, inputs)  # noqa: E731
    for tensor in (p for key, p in model.named_parameters() if key.endswith("bias")):
        torch.nn.init.normal_(tensor, generator=torch.Generator().manual_seed(1))  # alike ones would hide a mistake
    expected = run()
    before = [[matrices(p) for p in block.projections] for block in find_blocks(model)]
    sparsify_(model, SparsityConfig(1, 1, 16, "none"), method="magnitude", permute=True, progress=False)
    found = iter(orders)
    for block, old in zip(find_blocks(model), before, strict=True):
        for expert in range(block.experts):
            order = next(found)
            for projection, weight in zip(block.projections, old, strict=True):
                if projection.role == "down":
                    moved = weight[expert][:, order]
                else:
                    moved = torch.cat([run_[order] for run_ in weight[expert].chunk(projection.runs)])
                assert torch.equal(matrices(projection)[expert], moved)
    torch.testing.assert_close(run(), expected, rtol=1e-10, atol=1e-12)


def test_experts_of_a_list() -> None:
    torch.manual_seed(0)
    model, x = ListedModel(), torch.randn(200, 16)
    report = sparsify_(model, CONFIG, calibration=[x], permute=True, progress=False)
    assert len(report.parameters) == 12 and "routing weights are not seen" in report.notes[0]
    assert {n.split(".")[0] for n, p in model.named_parameters() if isinstance(p, PackedTensor)} == {"experts"}
    packed = model(x).detach()
    assert densify_(model) == 12
    torch.testing.assert_close(packed, model(x).detach())


def test_experts_that_no_token_reaches() -> None:
    model, _ = build("mixtral")
    inputs = {"input_ids": torch.tensor([[5]])}  # two experts of eight in each layer
    blocks = find_blocks(model)
    stats = collect(model, blocks, [inputs], Wanted())
    by_size = {p.name: matrices(p) for block in blocks for p in block.projections}
    report = sparsify_(model, CONFIG, calibration=[inputs], progress=False)
    for projection in (p for block in find_blocks(model) for p in block.projections):
        missed = (stats[projection.name].count == 0).nonzero().flatten().tolist()
        assert list(report.unreached[projection.name]) == missed and len(missed) == 6
        weight = by_size[projection.name][missed]
        assert torch.equal(matrices(projection)[missed], weight * best_mask(weight.abs().square(), CONFIG))


def test_part_of_the_experts() -> None:
    model, inputs = build("gpt_oss")
    before = state(model)
    name = "model.layers.1.mlp.experts.down_proj"
    report = sparsify_(model, CONFIG, calibration=[inputs], filter_fn=[name], permute=True, progress=False)
    assert [(p.name, p.permuted) for p in report.parameters] == [(name, False)]
    assert "only a part is chosen" in report.notes[0]
    after = model.state_dict()
    assert {key for key in before if not isinstance(after[key], PackedTensor) and after[key].equal(before[key])} == (
        before.keys() - {name}
    )
    rest = sparsify_(model, CONFIG, calibration=[inputs], filter_fn=lambda n, _: "gate_up" in n, progress=False)
    assert len(rest.parameters) == 2  # one beside a projection that is packed already


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"config": "2:4"}, "config: is a str; pass a SparsityConfig"),
        ({"method": "sparsegpt"}, "method: is 'sparsegpt'"),
        ({"calibration": None}, "calibration: is None"),
        ({"calibration": []}, "calibration: none of its 0 inputs reaches an expert"),
        ({"calibration": [torch.empty(0, 16)]}, "calibration: none of its 1 inputs reaches an expert"),
        ({"calibration": [object()]}, "calibration: has a object"),
        ({"calibration": [torch.full((2, 16), torch.inf)]}, "infinite or NaN"),
        ({"filter_fn": ["router.weight"]}, r"router\.weight: is no expert weight"),
        ({"filter_fn": lambda name, module: False}, "filter_fn: chooses none"),
        ({"method": "second_order", "refine": True}, "refine: method 'second_order'"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, object], reason: str) -> None:
    model = ListedModel().train()
    before = state(model)
    given = {"config": CONFIG, "calibration": [torch.randn(20, 16)], "progress": False} | arguments
    with pytest.raises(SparsityError, match=reason):
        sparsify_(model, given.pop("config"), **given)
    assert unchanged(model, before) and all(module.training for module in model.modules())


def test_bad_weights_change_nothing() -> None:
    model, inputs = build("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[7, 3, 2] = float("nan")
    before = {key: value for key, value in state(model).items() if "1.mlp.experts.down" not in key}
    with pytest.raises(SparsityError, match=r"layers\.1\.mlp\.experts\.down_proj: .* infinite or NaN"):
        sparsify_(model, CONFIG, calibration=[inputs], progress=False)
    assert type(model.model.layers[1].mlp.experts.down_proj) is nn.Parameter
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_features_that_are_not_alike_are_not_moved() -> None:
    model = ListedModel(kind=Mixing)
    before = state(model)
    with pytest.raises(SparsityError, match=r"experts\.0: treats its intermediate features differently; pass permute"):
        sparsify_(model, CONFIG, calibration=[torch.randn(20, 16)], permute=True, progress=False)
    assert unchanged(model, before)


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_what_fails_on_the_way(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack's parameters are replaced together, biases and order too; the first stack's failure changes nothing."""
    model, inputs = build("gpt_oss")
    before, calls = state(model), []

    def packed(*args):
        calls.append(args)
        if len(calls) == failing:
            raise MemoryError("no more")
        return real(*args)

    real = job.packed
    monkeypatch.setattr(job, "packed", packed)
    error = MemoryError if failing < 3 else SparsityError
    with pytest.raises(error, match="no more" if failing < 3 else r"2 weights up to .*layers\.0.* load the model"):
        sparsify_(model, CONFIG, calibration=[inputs], permute=True, progress=False)
    after = model.state_dict()
    first = {key for key in before if "layers.0.mlp.experts" in key and "down_proj_bias" not in key}
    changed = {key for key in before if isinstance(after[key], PackedTensor) or not after[key].equal(before[key])}
    assert changed == (first if failing == 3 else set())


def test_masks_that_have_no_room_change_nothing() -> None:
    """The last module's; all are looked at before the first is changed."""
    model = ListedModel()
    model.experts[3].down_proj.weight_mask = None
    before = state(model)
    with pytest.raises(SparsityError, match=r"experts\.3\.down_proj\.weight: its module has a weight_mask of its own"):
        sparsify_(model, CONFIG, method="magnitude", trainable=True, progress=False)
    assert unchanged(model, before) and not masked_parameters(model)
    sparsify_(model, CONFIG, method="magnitude", progress=False)  # packing needs no masks


def test_masks_that_fail_leave_their_block_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first block, whose features and biases would have been put in another order."""
    model, inputs = build("gpt_oss")
    before = state(model)
    monkeypatch.setattr(prepare, "_mask", lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
    with pytest.raises(MemoryError, match="no more"):
        sparsify_(model, CONFIG, calibration=[inputs], permute=True, trainable=True, progress=False)
    assert unchanged(model, before) and not masked_parameters(model)


def test_dense_weights_elsewhere_stay() -> None:
    """The parameters are replaced, not written to."""
    model, inputs = build("gpt_oss")
    shared, before = model.state_dict(), state(model)
    sparsify_(model, CONFIG, calibration=[inputs], permute=True, progress=False)
    assert all(torch.equal(shared[key], value) for key, value in before.items())


def test_without_calibration() -> None:
    model, _ = build("mixtral")
    report = sparsify_(model, CONFIG, method="magnitude", progress=False)
    assert report.relative_error is None and not report.unreached and 0.4 < report.kept_energy < 0.6


def test_report(capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = build("mixtral")
    report = sparsify_(model, CONFIG, calibration=(inputs for _ in range(2)))
    assert "sparsify" in capfd.readouterr().err
    values = json.loads(json.dumps(report.to_dict()))
    assert values["method"] == "router_wanda" and values["config"]["vector"] == 32
    assert values["bytes_after"] == sum(p["bytes_after"] for p in values["parameters"]) < 0.3 * values["bytes_before"]
    text = str(report)
    assert "1:2:32+2:4 by router_wanda" in text and all(p.name in text for p in report.parameters)
    assert f"{report.kept_energy:.4f}" in text


@pytest.mark.parametrize("method", ["magnitude", "router_wanda", "second_order"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "llama4"])
def test_trainable(name: str, method: str) -> None:
    """The model computes what the packed one does; it trains, and what it has learned has the pattern."""
    model, inputs = build(name)
    packed = copy.deepcopy(model)
    arguments = {"method": method, "calibration": [inputs], "permute": method != "second_order", "progress": False}
    sparsify_(packed, CONFIG, **arguments)
    report = sparsify_(model, CONFIG, trainable=True, **arguments)
    torch.testing.assert_close(logits(model, inputs), logits(packed, inputs), rtol=1e-4, atol=1e-5)
    masters = masked_parameters(model)
    assert {m.name for m in masters} == {p.name for p in report.parameters}
    assert all(bool((m.master[~m.mask] != 0).any()) for m in masters)  # dense, to come back in training
    training = SparseTraining(CONFIG, method="sr_ste", refresh_every=1)
    training.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        families.loss_of(model(**inputs)).backward()
        training.before_step()
        optimizer.step()
        training.step()
        optimizer.zero_grad()
    training.finish()
    trained = logits(model, inputs)
    sparsify_(model, CONFIG, method="magnitude", progress=False)  # nothing more is pruned
    torch.testing.assert_close(logits(model, inputs), trained, rtol=1e-4, atol=1e-5)
