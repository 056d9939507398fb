"""Put the intermediate features of an expert into another order; the expert computes what it did.

Row i of gate and of up, their biases, and column i of down belong to feature i, and the activation works feature by
feature. So any order gives the same expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samoyeds_compile.errors import SparsityError
from samoyeds_compile.sparsity.by_rows import runs_of
from samoyeds_compile.sparsity.install import Replacement
from samoyeds_compile.sparsity.projections import Block, Projection, Stack


def require_permutable(block: Block) -> None:
    """Check that an expert's features can be put in another order.

    Raises:
        SparsityError: its projections are not one down after one or two ups, or its features are not alike.
    """
    ups, downs = block.of_role("up"), block.of_role("down")
    if len(downs) != 1 or not ups or len(ups) + 1 != len(block.projections):
        raise SparsityError(
            f"{block.name}: has {len(block.projections)} projections that are not one or two into the intermediate "
            "features and one out of them; pass permute=False"
        )
    features = downs[0].shape[1]
    if any(up.shape[0] != up.runs * features for up in ups):
        raise SparsityError(f"{block.name}: {downs[0].name} does not take what the others give; pass permute=False")
    with torch.no_grad():
        _require_alike(block, features)


def _require_alike(block: Block, features: int) -> None:
    """Rotate the features of made-up values: what is between the projections must rotate with them."""
    order = torch.arange(features, device=block.projections[0].parameter.device).roll(1)
    expected, found = _listed_trial(block, order) if block.stack is None else _stacked_trial(block, block.stack, order)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())):
        raise SparsityError(f"{block.name}: treats its intermediate features differently; pass permute=False")


def _stacked_trial(block: Block, stack: Stack, order: Tensor) -> tuple[Tensor, Tensor]:
    """What down takes, for up projections as they are and in an order."""
    ups = block.of_role("up")
    outputs = [_made_up(order, len(order) * up.runs, up.parameter.dtype) + shift for shift, up in enumerate(ups)]
    ordered = [_reordered(up, output, order) for up, output in zip(ups, outputs, strict=True)]
    return stack.between(*outputs)[:, order], stack.between(*ordered)


def _listed_trial(block: Block, order: Tensor) -> tuple[Tensor, Tensor]:
    """What an expert gives, as it is and with its features in an order."""
    like = block.projections[0]
    x = _made_up(order, like.shape[1], like.parameter.dtype)
    changed = {}
    for p in block.projections:
        path = p.name.removeprefix(f"{block.name}.").removesuffix(p.attribute)
        changed[f"{path}{p.attribute}"] = p.parameter[order] if p.role == "up" else p.parameter[:, order]
        if p.role == "up" and p.bias is not None:
            changed[f"{path}{p.bias}"] = getattr(p.owner, p.bias)[order]
    try:
        given = [torch.func.functional_call(block.module, with_, x) for with_ in ({}, changed)]
    except Exception as error:
        raise SparsityError(f"{block.name}: can't be tried on tokens alone ({error}); pass permute=False") from error
    return given[0], given[1]


def _made_up(order: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Three rows of values, where ``order`` is."""
    return torch.linspace(-2, 2, 3 * width, device=order.device, dtype=dtype).cos().view(3, width)


def reordered_biases(block: Block, orders: list[Tensor]) -> list[Replacement]:
    """The biases of the up projections in an order for each expert."""
    found = []
    for up in block.of_role("up"):
        if up.bias is None:
            continue
        old = getattr(up.owner, up.bias)
        parts = old.detach() if up.stacked else old.detach()[None]
        new = torch.stack([_reordered(up, part, order) for part, order in zip(parts, orders, strict=True)])
        parameter = nn.Parameter(new.view_as(old), requires_grad=old.requires_grad)
        found.append(Replacement(up.owner, up.bias, parameter))
    return found


def _reordered(up: Projection, stored: Tensor, order: Tensor) -> Tensor:
    """Outputs of an up projection [..., rows], as stored, with their features in an order."""
    if not up.interleaved:
        return stored[..., runs_of(order, stored.shape[-1])]
    alternating: Tensor = stored.unflatten(-1, (-1, up.runs))
    return alternating[..., order, :].flatten(-2)
