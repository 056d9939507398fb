"""Every family of transformers through `sparsify_`: as with pruned dense weights, eager, and compiled in one graph."""

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn

from samoyeds_compile import Report, densify_, sparsify_
from samoyeds_compile.integrations.transformers import enable
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig
from tests.coverage_page import LOOPS
from tests.models import families
from tests.sparsity.experts_models import CLASSES, experts_of, logits

DECORATED = {entry.id for entry in families.decorated_experts_classes()}
REFUSED = {"doge"}
NOT_REWRITTEN = {"vitpose_backbone"}
"""What the backend leaves alone with dense weights as well."""
CONFIG = SparsityConfig(1, 2, 32)
TOLERANCE = 5e-4


def made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that runs grouped products if it can, and its inputs."""
    model = families.build(CLASSES[name]).eval()
    if name in DECORATED:
        model.set_experts_implementation("grouped_mm")
    inputs = families.inputs(CLASSES[name], model, seq=8)
    if name == "switch_transformers":  # without masks the library's own code breaks the graph
        inputs |= {key.replace("input_ids", "attention_mask"): torch.ones_like(x) for key, x in inputs.items()}
    return model, inputs


def sparse(model: nn.Module, **arguments: object) -> nn.Module:
    """Makes a model sparse, and gives a dense copy with the weights that are left."""
    report = sparsify_(model, CONFIG, progress=False, **arguments)
    packed = [name for name, parameter in model.named_parameters() if isinstance(parameter, PackedTensor)]
    assert sorted(p.name for p in report.parameters) == sorted(packed)
    dense = copy.deepcopy(model)
    assert densify_(dense) == len(packed)
    return dense


def run(forward, inputs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(7)
    return logits(forward, inputs)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def blocks_that_run(name: str, model: nn.Module) -> list[str]:
    """Names of the modules that run experts."""
    idle = families.recipe_of(CLASSES[name]).idle
    experts = experts_of(model, name)
    found = families.moe_blocks(model) if name in DECORATED else []
    found = found or [path for path, module in model.named_modules() if any(module is e for e in experts)]
    return sorted(path for path in found if not any(part in path for part in idle))


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in REFUSED])
def test_family(name: str) -> None:
    model, inputs = made(name)
    before = run(model, inputs)
    experts = experts_of(model, name)
    dense = sparse(model, calibration=[inputs])
    for key, parameter in (item for module in experts for item in module.named_parameters()):
        dense_there = key.endswith("bias") or "norm" in key or "router" in key
        assert isinstance(parameter, PackedTensor) != dense_there
    expected = run(dense, inputs)
    assert distance(before, expected) > 10 * TOLERANCE  # experts count, so that a wrong one is seen
    assert distance(run(model, inputs), expected) <= TOLERANCE
    report = Report()
    forward = torch.compile(model, backend="samoyeds", options={"report": report, "base": "aot_eager"})
    with enable(model) if name in LOOPS else contextlib.nullcontext():
        assert distance(run(forward, inputs), expected) <= TOLERANCE
    assert len(report.graphs) == 1
    assert [b.reason for b in report.blocks if not b.rewritten] == []
    wanted = [] if name in NOT_REWRITTEN else blocks_that_run(name, model)
    assert sorted(b.module for b in report.blocks) == wanted


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_other_implementations(name: str, implementation: str) -> None:
    """Gathered matrices and the loop over experts, eager mode."""
    model, inputs = made(name)
    model.set_experts_implementation(implementation)
    dense = sparse(model, method="magnitude")
    assert distance(run(model, inputs), run(dense, inputs)) <= TOLERANCE


def test_on_inductor() -> None:
    """bfloat16, the second call with other lengths."""
    model = families.build(CLASSES["mixtral"], dtype=torch.bfloat16).eval()
    dense = sparse(model, method="magnitude")
    forward = torch.compile(model, backend="samoyeds")
    for length in (9, 5):
        inputs = {"input_ids": torch.randint(0, 50, (2, length))}
        assert distance(run(forward, inputs).float(), run(dense, inputs).float()) <= 5e-2
