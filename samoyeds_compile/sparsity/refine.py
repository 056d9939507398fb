"""Refine a mask without training: swap kept and pruned values of the same four (after DSnoT, arXiv 2310.08915)."""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_compile.sparsity.config import SparsityConfig

CYCLES = 50
"""Swaps in a row, at most."""


def refine(
    weight: Tensor, mask: Tensor, mean: Tensor, square: Tensor, config: SparsityConfig, cycles: int = CYCLES
) -> Tensor:
    """Swap values so that the error of the mean input's output shrinks; the pattern stays.

    With ε the error of a row at the mean input and V = Σ w² Var(x) over what is pruned, ε² + V is the expected squared
    error if the features are uncorrelated. In each cycle each row makes the one swap that lowers ε² + V the most, among
    those that also lower |ε|. With ``inner="none"`` a row has nothing to swap, and the mask stays.

    Args:
        weight: [rows, cols].
        mask: bool [rows, cols], of the pattern.
        mean: [cols] of the inputs.
        square: [cols], mean square of the inputs.
        config: the pattern.
        cycles: see `CYCLES`.

    Returns:
        A new mask.
    """
    mask = mask.clone()
    if config.inner == "none":
        return mask
    whole = weight.shape[1] // 4 * 4  # a ragged four at the end stays as it is
    shift = (weight.float() * mean).contiguous()
    spread = weight.float().square() * (square - mean.square()).clamp(min=0)
    error = (shift * ~mask).sum(dim=1)
    fours = mask[:, :whole].unflatten(1, (-1, 4))
    shift, spread = (part[:, :whole].unflatten(1, (-1, 4)) for part in (shift, spread))
    for _ in range(cycles):
        gain, change, pair = _best_swap(fours, shift, spread, error)
        swaps = gain > 0
        if not bool(swaps.any()):
            break
        rows = swaps.nonzero().squeeze(1)
        four, place = pair[rows] // 16, pair[rows] % 16
        fours[rows, four, place // 4] = False
        fours[rows, four, place % 4] = True
        error[rows] += change[rows]
    return mask


def _best_swap(fours: Tensor, shift: Tensor, spread: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row [rows]: what the best swap lowers ε² + V by, what it adds to ε, and four · 16 + out · 4 + in."""
    added = shift.unsqueeze(-1) - shift.unsqueeze(-2)  # [rows, fours, out, in]
    worse = spread.unsqueeze(-1) - spread.unsqueeze(-2)
    after = error[:, None, None, None] + added
    before = error[:, None, None, None]
    gain = before.square() - after.square() - worse
    legal = fours.unsqueeze(-1) & ~fours.unsqueeze(-2) & (after.abs() < before.abs())
    gain = gain.masked_fill(~legal, -1.0).flatten(1)
    best, pair = gain.max(dim=1)
    tiny = torch.finfo(torch.float32).eps * error.square()  # rounding is no gain: it could swap back and forth
    best = torch.where(best > tiny, best, 0.0)
    return best, added.flatten(1).gather(1, pair.unsqueeze(1)).squeeze(1), pair
