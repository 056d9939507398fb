"""Which parameters are experts, and how their weights are read and written."""

import copy

import pytest
import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, sparsify_
from samoyeds_compile.sparsity.by_rows import Matrix
from samoyeds_compile.sparsity.checks import require_prunable
from samoyeds_compile.sparsity.experts import find_blocks
from samoyeds_compile.sparsity.projections import Block
from samoyeds_compile.sparsity.training import make_trainable_
from tests.sparsity.experts_models import (
    CLASSES,
    OTHER_STACKS,
    STACKED,
    ListedModel,
    build,
    experts_of,
    state,
    unchanged,
)

MATRICES = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("name", [*STACKED, *OTHER_STACKS])
def test_stacks_are_found(name: str) -> None:
    model, _ = build(name)
    blocks = find_blocks(model)
    assert [block.module for block in blocks] == experts_of(model, name)
    for block in blocks:
        *ups, down = block.projections
        assert down.role == "down" and {up.role for up in ups} == {"up"}
        assert block.chosen == {p.name for p in block.projections} and block.experts == down.experts == 8
        assert all(model.get_parameter(p.name) is p.parameter for p in block.projections)
        for up in ups:
            assert up.shape == (up.runs * down.shape[1], down.shape[0])
            assert up.experts == 8 + 2 * (name == "longcat_flash")  # of experts that pass tokens on, and read by nobody


def recorded(model: nn.Module, blocks: list[Block], inputs: dict[str, Tensor]) -> dict[str, tuple]:
    """Arguments and output of every block's module."""
    seen = {}

    def hook(name, args, kwargs, output):
        seen[name] = (args, kwargs, output)

    for block in blocks:
        block.module.register_forward_hook(lambda _, *call, name=block.name: hook(name, *call), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    return seen


@pytest.mark.parametrize("name", OTHER_STACKS)
@torch.no_grad()
def test_what_is_read_of_stacks_adds_up_to_what_they_give(name: str) -> None:
    """Tokens, routing weights, matrices and gates, summed over all experts and tokens."""
    model, inputs = build(name)
    blocks = find_blocks(model)
    for block_name, (args, kwargs, output) in recorded(model, blocks, inputs).items():
        (block,) = (block for block in blocks if block.name == block_name)
        *ups, down = block.projections
        total = 0
        for expert, x, weights in block.stack.tokens(*args, **kwargs):
            between = block.stack.between(*(x @ Matrix.of(up, expert).rows(slice(None)).T for up in ups))
            total = total + (weights[:, None] * (between @ Matrix.of(down, expert).rows(slice(None)).T)).sum(0)
        if name == "jetmoe":
            total = total + block.module.bias * output[..., 0].numel()
        if name == "longcat_flash":
            x, ids, weights = [*args, *kwargs.values()]
            total = total + ((weights * (ids >= 8)).sum(1, keepdim=True) * x).sum(0)
        torch.testing.assert_close(output.flatten(0, -2).sum(0), total, rtol=1e-4, atol=1e-5)


def test_experts_that_are_rows_of_an_embedding() -> None:
    """Doge: refused, and for what it is."""
    model, _ = build("doge")
    before = state(model)
    with pytest.raises(SparsityError, match=r"layers\.0\.mlp: its experts are single rows of nn\.Embedding.* leave"):
        sparsify_(model, SparsityConfig(), method="magnitude", progress=False)
    assert unchanged(model, before)


def test_lists_are_found() -> None:
    """Not the shared experts, the router, or a list of other layers."""
    model = ListedModel()
    blocks = find_blocks(model)
    found = {p.name: p.role for block in blocks for p in block.projections}
    expected = {f"experts.{e}.{name}.weight" for e in range(4) for name in MATRICES}
    assert found.keys() == expected
    assert all(role == ("down" if "down" in name else "up") for name, role in found.items())


def test_roles_by_shape() -> None:
    """Where names say nothing, the last projection is the one that takes what the others give."""
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(2))
    assert [[p.role for p in block.projections] for block in find_blocks(model)] == [["up", "down"]] * 2
    model.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 9)) for _ in range(2))
    assert {p.role for block in find_blocks(model) for p in block.projections} == {"other"}


@pytest.mark.parametrize("name", STACKED)
def test_matrix_is_what_an_expert_multiplies_with(name: str) -> None:
    model, _ = build(name)
    for block in find_blocks(model)[:1]:
        for projection in block.projections:
            stored = projection.parameter.detach()
            expected = stored[2].T if projection.transposed else stored[2]
            if projection.interleaved:
                expected = torch.cat([expected[::2], expected[1::2]])
            assert expected.shape == projection.shape
            assert torch.equal(Matrix.of(projection, 2).rows(slice(None)), expected)
    assert any(p.interleaved for p in block.projections) == (name == "gpt_oss")


class Handwritten(nn.Module):
    """Stacks with the names and arguments of transformers, not decorated."""

    def __init__(self, experts: int = 4, extra: bool = False, passing: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 48, 16))
        self.down_proj = nn.Parameter(torch.randn(4, 16, 24))
        self.act_fn = nn.SiLU()
        if extra:
            self.scale = nn.Parameter(torch.ones(24))
        if passing:
            self.identity = nn.Identity()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


def test_handwritten_stacks() -> None:
    """As a decorated module of the default layout; not if there is more to it, or shapes do not fit."""
    (block,) = find_blocks(Handwritten())
    assert [(p.name, p.runs, p.role) for p in block.projections] == [
        ("gate_up_proj", 2, "up"),
        ("down_proj", 1, "down"),
    ]
    for other in (Handwritten(extra=True), Handwritten(experts=5), Handwritten(experts=3, passing=True)):
        with pytest.raises(SparsityError, match="has no expert weights"):
            find_blocks(other)
    (block,) = find_blocks(Handwritten(experts=5, passing=True))
    assert [p.experts for p in block.projections] == [5, 4] and block.experts == 4


class Counted(nn.Module):
    """A projection of rows sorted by expert."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, inputs, expert_size):
        raise NotImplementedError


def test_sorted_rows_without_a_gate() -> None:
    """As in jetmoe's attention: left alone, with or without the rest of what a mixture has."""
    model = nn.Module()
    model.input_linear, model.output_linear = Counted(4, 48, 16), Counted(4, 16, 24)
    model.router, model.activation = nn.Linear(16, 4), nn.SiLU()
    assert [p.name for p in find_blocks(model)[0].projections] == ["input_linear.weight", "output_linear.weight"]
    for change in ({"input_linear": Counted(4, 24, 16)}, {"router": None}, {"output_linear": nn.Linear(24, 16)}):
        other = copy.deepcopy(model)
        for name, module in change.items():
            setattr(other, name, module)
        with pytest.raises(SparsityError, match="has no expert weights"):
            find_blocks(other)


@pytest.mark.parametrize("rows", [8 * 96 + 4, 8 * 95])
def test_flat_parameters_that_are_no_matrices_of_experts(rows: int) -> None:
    """No whole number of matrices, and not alike."""
    model, _ = build("dbrx")
    for block in find_blocks(model):
        for name in ("w1", "v1", "w2")[: 3 if rows % 8 else 1]:
            setattr(block.module.mlp, name, nn.Parameter(torch.randn(rows, 64)))
    with pytest.raises(SparsityError, match="has no expert weights"):
        find_blocks(model)


def test_filter() -> None:
    model, _ = build("mixtral")
    names = [p.name for block in find_blocks(model) for p in block.projections]
    seen = []
    blocks = find_blocks(model, lambda name, module: seen.append((name, module)) or "layers.1" in name)
    assert [name for name, _ in seen] == names and all(isinstance(m, CLASSES["mixtral"].load()) for _, m in seen)
    assert [sorted(block.chosen) for block in blocks] == [sorted(names[2:])]
    (block,) = find_blocks(model, names[1:2])
    assert block.chosen == {names[1]} and len(block.projections) == 2


def test_what_is_no_expert() -> None:
    model, _ = build("mixtral")
    with pytest.raises(SparsityError, match=r"lm_head.weight: is no expert weight .*experts\.down_proj"):
        find_blocks(model, ["lm_head.weight"])
    with pytest.raises(SparsityError, match="filter_fn: chooses none of the 4"):
        find_blocks(model, lambda name, module: False)
    with pytest.raises(SparsityError, match="Linear: has no expert weights"):
        find_blocks(nn.Linear(4, 4))


def _nan(model: nn.Module) -> None:
    model.experts[2].up_proj.weight.data[3, 4] = float("nan")


def _tied(model: nn.Module) -> None:
    model.experts[2].up_proj.weight = model.experts[1].up_proj.weight


def _meta(model: nn.Module) -> None:
    model.experts[2].up_proj.to("meta")


def _integers(model: nn.Module) -> None:
    weight = model.experts[2].up_proj.weight
    model.experts[2].up_proj.weight = nn.Parameter(weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def _packed(model: nn.Module) -> None:
    zeros = torch.zeros_like(model.experts[2].up_proj.weight)
    weight = PackedTensor.from_dense(zeros, SparsityConfig())
    model.experts[2].up_proj.weight = nn.Parameter(weight, requires_grad=False)


def _masked(model: nn.Module) -> None:
    make_trainable_(model, ["experts.2.up_proj.weight"], SparsityConfig())


def _empty(model: nn.Module) -> None:
    for expert in model.experts:
        expert.up_proj.weight = nn.Parameter(torch.empty(0, 16))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_empty, "is empty"),
        (_masked, "computed from other parameters"),
        (_nan, "infinite or NaN"),
        (_tied, r"is the same parameter as"),
        (_meta, "meta device"),
        (_integers, "float8_e4m3fn"),
        (_packed, "PackedTensor; .*densify_"),
    ],
)
def test_weights_that_cannot_be_pruned(spoil, reason: str) -> None:
    model = copy.deepcopy(ListedModel())
    require_prunable(model, find_blocks(model))
    spoil(model)
    with pytest.raises(SparsityError, match=rf"experts\.[012]\.up_proj\.weight: .*{reason}"):
        require_prunable(model, find_blocks(model))
    require_prunable(model, find_blocks(model, ["experts.0.down_proj.weight"]))  # what is not chosen does not matter
