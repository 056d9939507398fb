"""What calibration tokens say about the inputs of expert projections, gathered by hooks on the eager model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.projections import Block, Projection, Stack
from samoyeds_compile.sparsity.stats import InputStats, Stats, Wanted


def collect(
    model: nn.Module,
    blocks: list[Block],
    calibration: Iterable[Any],
    wanted: Wanted,
    advance: Callable[[], None] = lambda: None,
) -> Stats:
    """Run the model over calibration inputs and gather statistics of all projections of some blocks.

    The model is left in the mode it was in.

    Args:
        model: the eager model.
        blocks: which experts.
        calibration: for each call of the model a mapping of keyword arguments, a tuple or list of arguments, or a
            tensor; on the device where the model wants them.
        wanted: what to gather.
        advance: called after each.

    Raises:
        SparsityError: an input of an expert is infinite or NaN.
    """
    sizes = {block.layer: sum(other.layer == block.layer for other in blocks) for block in blocks}
    stats = {p.name: InputStats.zeros(p, wanted, sizes[b.layer]) for b in blocks for p in b.projections}
    with _hooked(blocks, stats, wanted.routed):
        run(model, calibration, advance)
    for name, found in stats.items():
        if not bool(found.squares.isfinite().all()):
            raise SparsityError(f"{name}: calibration gives it inputs that are infinite or NaN; check model and inputs")
    return stats


def run(model: nn.Module, calibration: Iterable[Any], advance: Callable[[], None] = lambda: None) -> None:
    """Call the model with each calibration input, in eval mode and without gradients, for its hooks' sake."""
    with evaluating(model), torch.no_grad():
        for inputs in calibration:
            _call(model, inputs)
            advance()


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        model(*inputs)
    elif isinstance(inputs, Tensor):
        model(inputs)
    else:
        raise SparsityError(
            f"calibration: has a {type(inputs).__name__}; pass mappings of keyword arguments, tuples or tensors"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a while."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@contextlib.contextmanager
def _hooked(blocks: list[Block], stats: Stats, routed: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for block in blocks:
            if block.stack is not None:
                hook = _stacked_hook(block, block.stack, stats, routed)
                stack.callback(block.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                continue
            for projection in block.projections:
                seen = _linear_hook(stats[projection.name], routed)
                stack.callback(projection.owner.register_forward_pre_hook(seen).remove)
        yield


def _linear_hook(stats: InputStats, routed: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Of one expert of a list; how its tokens are weighted is not visible there, so all weigh the same."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        stats.add(0, x, torch.ones(len(x), device=x.device), routed)

    return hook


def _stacked_hook(block: Block, stack: Stack, stats: Stats, routed: bool) -> Callable[..., None]:
    ups, (down,) = block.of_role("up"), block.of_role("down")

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for expert, x, weights in stack.tokens(*args, **kwargs):
            if len(x):
                for up in ups:
                    stats[up.name].add(expert, x, weights, routed)
                between = stack.between(*(_output(up, expert, x) for up in ups))
                stats[down.name].add(expert, between, weights, routed)

    return hook


def _output(up: Projection, expert: int, x_NH: Tensor) -> Tensor:
    """What a projection of a stack, dense or packed, gives for tokens of an expert: [N, R] in stored order."""
    weight = up.stored[expert]
    bias = None if up.bias is None else getattr(up.owner, up.bias)[expert]
    return F.linear(x_NH.to(weight.dtype), weight.mT if up.transposed else weight, bias)
