"""Operands of sparse matrix instructions, written from the tables of the PTX ISA and not from the emulator.

Sources: PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types", "Matrix Fragments for
mma.m16n8k32" (B), "Matrix fragments for wgmma.mma_async.sp" (accumulators, metadata).
"""

import torch
from torch import Tensor


def sparse_matrix(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Dense [rows, columns] with 2:4 zeros in float64, its kept values, and positions int64 [rows, columns / 2]."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns // 4, 4, generator=generator).to(dtype)
    kept = torch.rand(dense.shape, generator=generator).topk(2, -1).indices.sort(-1).values
    values = dense.gather(-1, kept)
    zeros = torch.zeros(dense.shape, dtype=torch.float64).scatter(-1, kept, values.double())
    return zeros.flatten(1), values.flatten(1), kept.flatten(1)


def words(pairs: Tensor) -> Tensor:
    """[..., 2] 16-bit numbers as int32, the first in the low half."""
    return pairs.contiguous().view(torch.int32).squeeze(-1)


def a_fragment(values: Tensor) -> Tensor:
    """Kept values [16, 16] as int32 [32 lanes, 4 registers]."""
    lanes = []
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        # PTX counts dense columns: 4 * thread for a0 to a3, 16 more for a4 to a7; two of each four are kept.
        firsts = [(group, 4 * thread), (group + 8, 4 * thread), (group, 4 * thread + 16), (group + 8, 4 * thread + 16)]
        lanes.append(torch.stack([values[row, column // 2 : column // 2 + 2] for row, column in firsts]))
    return words(torch.stack(lanes))


def b_fragment(b: Tensor) -> Tensor:
    """b [32, 8] as int32 [32 lanes, 4 registers]."""
    lanes = []
    for lane in range(32):
        group, thread = lane // 4, lane % 4
        lanes.append(torch.stack([b[8 * i + 2 * thread : 8 * i + 2 * thread + 2, group] for i in range(4)]))
    return words(torch.stack(lanes))


def metadata_fragment(positions: Tensor, selector: int, others: int = 0) -> Tensor:
    """Positions [16, 16] as int32 [32 lanes]; lanes that do not supply any have ``others``."""
    lanes = torch.full((32,), others, dtype=torch.int64)
    for group in range(8):
        for half in range(2):
            lanes[4 * group + 2 * selector + half] = _nibbles(positions, group, half) | (
                _nibbles(positions, group + 8, half) << 16
            )
    return torch.where(lanes >= 1 << 31, lanes - (1 << 32), lanes).to(torch.int32)


def _nibbles(positions: Tensor, row: int, half: int) -> int:
    kept = positions[row, 8 * half : 8 * half + 8].tolist()
    return sum(position << (2 * i) for i, position in enumerate(kept))


def accumulator(fragment: Tensor) -> Tensor:
    """[32 lanes, 4] of one warp as [16, 8]."""
    c = torch.empty(16, 8, dtype=fragment.dtype)
    for lane in range(32):
        for i in range(4):
            c[lane // 4 + 8 * (i >= 2), lane % 4 * 2 + i % 2] = fragment[lane, i]
    return c


def warpgroup_accumulator(fragment: Tensor) -> Tensor:
    """[128 threads, N / 2] as [64, N]: warp w has rows 16 w to 16 w + 15, and every 4 registers 8 columns."""
    warps = fragment.view(4, 32, -1, 4)
    return torch.cat([torch.cat([accumulator(warp[:, j]) for j in range(warps.shape[2])], dim=1) for warp in warps])
