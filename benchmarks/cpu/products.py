"""Arms that multiply and do nothing else: dense products by ``torch.mm``, oneDNN and MKL.

The products are those of the tokens that the router chose, up and down of each expert, and those of a shared expert. No
router, gather, activation or sum: libraries get less to do than the blocks they are compared with. ``onednn`` and
``mkl`` get weights packed beforehand for the number of rows at hand, which is not timed; ``mm`` packs in each call, as
PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cpu.shapes import shared_expert

Arm = Callable[[], object]


@dataclass(frozen=True)
class Product:
    """``rows_MI @ weight_OI.T``."""

    weight_OI: Tensor
    rows_MI: Tensor


def products_of(block: nn.Module, ids_TK: Tensor, x: Tensor) -> list[Product]:
    """The dense products of one call; what the down projections multiply is random."""
    rows_TH = x.flatten(0, -2)
    taken = {e: rows_TH[(ids_TK == e).any(-1)] for e in ids_TK.unique().tolist()}
    up, down = block.experts.gate_up_proj, block.experts.down_proj
    found = [p for e, rows in taken.items() for p in (Product(up[e], rows), _after(rows, down[e]))]
    shared = shared_expert(block)
    if shared is not None:
        found += [Product(shared.gate_proj.weight, rows_TH), Product(shared.up_proj.weight, rows_TH)]
        found.append(_after(rows_TH, shared.down_proj.weight))
    return found


def _after(rows_MH: Tensor, weight_OI: Tensor) -> Product:
    return Product(weight_OI, torch.randn(len(rows_MH), weight_OI.shape[1]).to(rows_MH.dtype))


def _mm(p: Product) -> Arm:
    return partial(torch.mm, p.rows_MI, p.weight_OI.t())


def _onednn(p: Product) -> Arm:
    packed = torch.ops.mkldnn._reorder_linear_weight(p.weight_OI.contiguous(), len(p.rows_MI))
    return partial(torch.ops.mkldnn._linear_pointwise.default, p.rows_MI, packed, None, "none", [], "")


def _mkl(p: Product) -> Arm:
    if p.weight_OI.dtype != torch.float32:
        raise RuntimeError("only float32 can be packed")
    weight, count = p.weight_OI.contiguous(), len(p.rows_MI)
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, count)
    return partial(torch.ops.mkl._mkl_linear.default, p.rows_MI, packed, weight, None, count)


LIBRARIES: dict[str, Callable[[Product], Arm]] = {"mm": _mm, "onednn": _onednn, "mkl": _mkl}


def missing(names: Sequence[str], dtype: torch.dtype) -> dict[str, str]:
    """Libraries that this machine or build of PyTorch does not have for a dtype, and why."""
    probe, found = Product(torch.zeros(32, 32, dtype=dtype), torch.zeros(2, 32, dtype=dtype)), {}
    for name in names:
        try:
            LIBRARIES[name](probe)()
        except (AttributeError, RuntimeError) as error:
            found[name] = str(error).partition("\n")[0]
    return found


def run(calls: Sequence[Arm]) -> None:
    """One call of an arm."""
    for call in calls:
        call()
