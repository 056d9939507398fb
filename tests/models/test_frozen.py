"""Families with parts that are not trained: gradients of the others equal to eager's, and none for what is frozen.

A few run always; all of them with ``-m slow``.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.models import families
from tests.models.test_families import CLASSES, TOLERANCE, blocks_that_run, build, compiled, relative, run

ALWAYS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


class Adapter(nn.Module):
    """A low-rank adapter beside a frozen projection, as LoRA has it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def freeze_router(model: nn.Module, experts: list[str]) -> None:
    """All that stands beside experts and is none."""
    around = tuple(f"{path.rpartition('.')[0]}." for path in experts)
    for name, parameter in model.named_parameters():
        of_block = next((name.removeprefix(block) for block in around if name.startswith(block)), "experts")
        parameter.requires_grad_("expert" in of_block)


def freeze_experts(model: nn.Module, experts: list[str]) -> None:
    for path in experts:
        model.get_submodule(path).requires_grad_(False)


def only_adapters(model: nn.Module, experts: list[str]) -> None:
    """Everything is frozen but adapters at the projections of attention."""
    model.requires_grad_(False)
    torch.manual_seed(11)
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear and "att" in name]:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Adapter(model.get_submodule(name)))


FREEZE = {"router": freeze_router, "experts": freeze_experts, "adapters": only_adapters}


@pytest.mark.parametrize("frozen", FREEZE)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in CLASSES]
)
def test_family(name: str, frozen: str) -> None:
    entry = CLASSES[name]
    model, inputs = build(entry, "grouped_mm", True)
    FREEZE[frozen](model, families.moe_blocks(model))
    if frozen == "adapters" and not any(isinstance(module, Adapter) for module in model.modules()):
        pytest.skip("its attention has no projections to adapt")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    logits, grads = run(model, model, inputs, True)
    if not grads:
        pytest.skip("nothing that is trained has a part in the result")
    forward, report = compiled(model, families.recipe_of(entry).train_base)
    new_logits, new_grads = run(model, forward, inputs, True)
    assert [b.reason for b in report.blocks if not b.rewritten] == []
    assert sorted(b.module for b in report.blocks) == sorted(blocks_that_run(entry, model))
    assert relative(new_logits, logits) < TOLERANCE
    assert new_grads.keys() == grads.keys() and grads.keys() <= trained < {key for key, _ in model.named_parameters()}
    wrong = {key: relative(new_grads[key], grad) for key, grad in grads.items()}
    assert {key: d for key, d in wrong.items() if d >= TOLERANCE} == {}
