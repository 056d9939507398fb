"""Every family of transformers with packed experts: as with pruned dense weights, eager, and compiled in one graph."""

import copy

import pytest
import torch
from torch import nn

from samoyeds_compile import Report
from samoyeds_compile.sparsity import PackedTensor, SparsityConfig, best_mask
from samoyeds_compile.sparsity.layout import StorageLayout
from tests.models import families

CLASSES = {entry.id: entry for entry in families.decorated_experts_classes()}
CONFIG = SparsityConfig(1, 2, 32)
TOLERANCE = 5e-4


def pruned(weight: torch.Tensor, layout: StorageLayout) -> torch.Tensor:
    matrix = layout.to_rows(weight.detach())
    return layout.to_stored(matrix * best_mask(matrix.abs(), CONFIG)).contiguous()


def pack_experts(model: nn.Module, wanted: type[nn.Module]) -> nn.Module:
    """Prunes the projections of the model in place, and returns a copy with packed ones."""
    packed = copy.deepcopy(model)
    pairs = zip(model.modules(), packed.modules(), strict=True)
    for experts, copied in [pair for pair in pairs if isinstance(pair[0], wanted)]:
        for name, parameter in list(experts.named_parameters(recurse=False)):
            if parameter.dim() != 3 or not name.endswith("_proj"):
                continue
            interleaved = name == "gate_up_proj" and not experts.is_concatenated
            parameter.data = pruned(parameter, StorageLayout(experts.is_transposed, interleaved))
            weight = PackedTensor.from_dense(
                parameter, CONFIG, transposed=experts.is_transposed, interleaved=interleaved, name=name
            )
            setattr(copied, name, nn.Parameter(weight, requires_grad=False))
    return packed


def logits(model, inputs):
    torch.manual_seed(7)
    with torch.no_grad():
        return families.logits_of(model(**inputs))


def close(actual, expected):
    assert float((actual - expected).abs().max()) <= TOLERANCE * float(expected.abs().max().clamp(min=1e-6))


@pytest.mark.parametrize("name", CLASSES)
def test_family(name: str) -> None:
    entry = CLASSES[name]
    model = families.build(entry).eval()
    model.set_experts_implementation("grouped_mm")
    inputs = families.inputs(entry, model)
    packed = pack_experts(model, entry.load())
    assert any(isinstance(p, PackedTensor) for p in packed.parameters())
    expected = logits(model, inputs)
    close(logits(packed, inputs), expected)
    report = Report()
    forward = torch.compile(packed, backend="samoyeds", options={"report": report, "base": "aot_eager"})
    close(logits(forward, inputs), expected)
    assert [b.reason for b in report.blocks if not b.rewritten] == []
    idle = families.recipe_of(entry).idle
    running = [path for path in families.moe_blocks(model) if not any(part in path for part in idle)]
    assert sorted(b.module for b in report.blocks) == sorted(running)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["batched_mm", "eager"])
def test_other_implementations(name: str, implementation: str) -> None:
    """Gathered matrices and the loop over experts, eager mode."""
    entry = CLASSES[name]
    model = families.build(entry).eval()
    model.set_experts_implementation(implementation)
    inputs = families.inputs(entry, model)
    packed = pack_experts(model, entry.load())
    close(logits(packed, inputs), logits(model, inputs))


def test_on_inductor() -> None:
    """bfloat16, the second call with other lengths."""
    entry = CLASSES["mixtral"]
    model = families.build(entry, dtype=torch.bfloat16).eval()
    packed = pack_experts(model, entry.load())
    forward = torch.compile(packed, backend="samoyeds")
    for length in (9, 5):
        inputs = {"input_ids": torch.randint(0, 50, (2, length))}
        expected, actual = logits(model, inputs).float(), logits(forward, inputs).float()
        assert float((actual - expected).abs().max()) <= 5e-2 * float(expected.abs().max())
