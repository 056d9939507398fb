"""What people do in loops of their own: the same losses, step by step, with the backend and without."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samoyeds_compile import Report
from tests.blocks import Block

STEPS = 4
Forward = Callable[[Tensor], Tensor]


class LanguageModel(nn.Module):
    """Two blocks between an embedding and a head; ``checkpoint`` computes each anew in the backward."""

    def __init__(self, checkpoint: bool = False) -> None:
        super().__init__()
        self.embedding, self.head, self.checkpoint = nn.Embedding(32, 16), nn.Linear(16, 32), checkpoint
        self.blocks = nn.ModuleList([Block(), Block(bias=True)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).flatten(0, 1)
        for block in self.blocks:
            x = x + (torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x))
        return self.head(x).unflatten(0, ids.shape)


def batch(step: int) -> Tensor:
    return torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(step))


def loss_of(forward: Forward, ids: Tensor) -> Tensor:
    return F.cross_entropy(forward(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def plain(model: nn.Module, forward: Forward) -> list[float]:
    optimizer, losses = adamw(model), []
    for step in range(STEPS):
        loss = loss_of(forward, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def accumulated_and_clipped(model: nn.Module, forward: Forward) -> list[float]:
    """Also with gradients that stay where they are: ``set_to_none=False``."""
    optimizer, losses = adamw(model), []
    for step in range(STEPS):
        for part in range(2):
            loss = loss_of(forward, batch(2 * step + part)) / 2
            loss.backward()
        losses += [loss.item(), float(nn.utils.clip_grad_norm_(model.parameters(), 0.1))]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return losses


def scaled_autocast(model: nn.Module, forward: Forward) -> list[float]:
    """A scale so large that the first steps are left out, by infinite gradients in float16."""
    optimizer, losses, scaler = adamw(model), [], torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=2)
    for step in range(STEPS):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(forward, batch(step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses += [loss.item(), scaler.get_scale()]
    return losses


def averaged(model: nn.Module, forward: Forward) -> list[float]:
    """An exponential moving average of the weights, which the same compiled code evaluates."""
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    compiled, optimizer, losses = type(forward) is not type(model), adamw(model), []
    for step in range(STEPS):
        loss_of(forward, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(average.module.state_dict())
        with torch.no_grad():
            losses.append(loss_of(forward if compiled else average.module, batch(100)).item())
        model.load_state_dict(kept)
    return losses


def loaded_in_between(model: nn.Module, forward: Forward) -> list[float]:
    """Back to an earlier checkpoint, once in place and once with parameters that are replaced."""
    optimizer, losses = adamw(model), []
    first = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for step in range(STEPS):
        loss = loss_of(forward, batch(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1:
            model.load_state_dict(first[0])
            optimizer.load_state_dict(first[1])
    model.load_state_dict(first[0], assign=True)
    return [*losses, loss_of(forward, batch(0)).item()]


def compiled_optimizer(model: nn.Module, forward: Forward) -> list[float]:
    """The optimizer's step goes through the backend as well; it finds nothing there, and it runs."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True), []
    step_ = torch.compile(optimizer.step, backend="samoyeds", options={"base": "aot_eager"})
    for step in range(STEPS):
        loss = loss_of(forward, batch(step))
        loss.backward()
        step_()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


LOOPS = [plain, accumulated_and_clipped, scaled_autocast, averaged, loaded_in_between, compiled_optimizer]


def run(loop: Callable[..., list[float]], make: Callable[[nn.Module], Any], **settings: Any) -> list[float]:
    torch.manual_seed(0)
    model = LanguageModel(**settings)
    return loop(model, make(model))


@pytest.mark.parametrize(("loop", "checkpoint"), [*((loop, False) for loop in LOOPS), (scaled_autocast, True)])
def test_losses_equal_eager(loop: Callable[..., list[float]], checkpoint: bool) -> None:
    report = Report()
    options = {"base": "aot_eager", "report": report}
    expected = run(loop, lambda model: model, checkpoint=checkpoint)
    found = run(loop, lambda model: torch.compile(model, backend="samoyeds", options=options), checkpoint=checkpoint)
    tolerance = 2e-3 if loop is scaled_autocast else 1e-5
    assert found == pytest.approx(expected, rel=tolerance)
    assert len({round(value, 6) for value in expected}) > 1  # something was learned
    assert report.rewritten and len(report.rewritten) == len(report.blocks) == 2 * len(report.graphs)
