"""What calibration tokens say about the inputs of expert projections, gathered by hooks on the eager model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.projections import Block
from samoyeds_compile.sparsity.stats import InputStats, Stats, Wanted


def collect(
    model: nn.Module,
    blocks: list[Block],
    calibration: Iterable[Any],
    wanted: Wanted,
    advance: Callable[[], None] = lambda: None,
) -> Stats:
    """Run the model over calibration inputs and gather statistics of all projections of some blocks.

    The model runs in eval mode without gradients, and is left in the mode it was in.

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
    with _hooked(blocks, stats, wanted.routed), _evaluating(model), torch.no_grad():
        for inputs in calibration:
            _call(model, inputs)
            advance()
    for name, found in stats.items():
        if not bool(found.squares.isfinite().all()):
            raise SparsityError(f"{name}: calibration gives it inputs that are infinite or NaN; check model and inputs")
    return stats


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
def _evaluating(model: nn.Module) -> Iterator[None]:
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
            if block.stacked:
                hook = _stacked_hook(block, stats, routed)
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


def _stacked_hook(block: Block, stats: Stats, routed: bool) -> Callable[..., None]:
    signature = inspect.signature(type(block.module).forward)
    (up,), (down,) = block.of_role("up"), block.of_role("down")

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, ids, weights = list(signature.bind(module, *args, **kwargs).arguments.values())[1:4]
        x, ids, weights = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, ids, weights))
        for expert, slots in enumerate(slots_of_experts(ids, block.experts)):
            if len(slots):
                tokens, of_tokens = x[slots // ids.shape[1]], weights.reshape(-1)[slots]
                stats[up.name].add(expert, tokens, of_tokens, routed)
                stats[down.name].add(expert, intermediate(block, expert, tokens), of_tokens, routed)

    return hook


def slots_of_experts(ids_TK: Tensor, experts: int) -> list[Tensor]:
    """For each expert the positions in the flattened ids where it stands; ids of nobody are left out."""
    ids = ids_TK.reshape(-1)
    order = ids.argsort(stable=True)
    known = (ids >= 0) & (ids < experts)
    order = order[known[order]]
    counts = torch.bincount(ids[known], minlength=experts).tolist()
    return list(order.split(counts))


def intermediate(block: Block, expert: int, x_NH: Tensor) -> Tensor:
    """What down takes, [N, I]: the expert's own first projection, bias, gate and activation."""
    (up,) = block.of_role("up")
    module: Any = block.module
    weight = up.parameter[expert]
    out = F.linear(x_NH.to(weight.dtype), weight.mT if up.transposed else weight)
    if up.bias is not None:
        out = out + getattr(module, up.bias)[expert]
    return activated(block, out)


def activated(block: Block, out_NR: Tensor) -> Tensor:
    """What a stack of experts makes of the output of its first projection: [N, I]."""
    module: Any = block.module
    gated = block.of_role("up")[0].attribute == "gate_up_proj"
    if gated and not hasattr(module, "_apply_gate"):
        gate, up = out_NR.chunk(2, dim=-1)
        return module.act_fn(gate) * up  # type: ignore[no-any-return]
    return module._apply_gate(out_NR) if gated else module.act_fn(out_NR)  # type: ignore[no-any-return]
