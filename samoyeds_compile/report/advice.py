"""What to change so that a block is rewritten."""

from __future__ import annotations

import re
from collections.abc import Iterable

from samoyeds_compile.report.model import BlockReport

_REPORT_IT = "if it computes what a MoE block computes, report it with the dumped before.py"
_OF_REASONS: tuple[tuple[str, str], ...] = (
    (
        r"treat every row on its own|rank of the rows",
        "let the activation treat each row alone",
    ),
    (
        r"read outside the block and would be computed twice",
        "return or log only the block's output; keep what is read for debugging out of the compiled model",
    ),
    (
        r"writes to one of its inputs|input of the block is overwritten|shares storage|written through a view",
        "write out of place: `y = x + z` instead of `x += z`, `x.clone()` before a write",
    ),
    (
        r"not sorted|ascending order|histogram|running sum|sort permutation|inverse",
        "sort the ids ascending, count experts 0 to E-1, gather rows by the permutation of the sort and put them back "
        "by its inverse, as transformers' grouped_mm does",
    ),
    (
        r"routing weights|k contributions|another k|not summed|scaled by",
        "multiply each row by its routing weight and sum the k rows of a token",
    ),
    (r"bias", "give each expert its own bias row, [E, out], indexed by the expert of the row"),
    (
        r"symbolic size|not static|known only when it runs",
        "keep sizes of weights and k constant; mark only the number of tokens as dynamic",
    ),
    (r"transposed|no stack|neither I nor 2I|different numbers", "store all experts' weights alike, as [E, out, in]"),
    (r"grad mode or autocast changes", "enter torch.no_grad and autocast around the whole block, not inside it"),
    (r"rewriting is switched off", "leave out rewrite=False and SAMOYEDS_REWRITE=0"),
    (r"validation refused|internal error|Error: ", "this is a defect: please report it with the dumped before.py"),
    (r"opaque to the compiler", "pass gate=, up=, down= to @samoyeds_compile.moe_experts"),
    (r"no surface pattern", "pass inputs that reach the block; docs/coverage.md lists the forms that are matched"),
)


def remedy_for_block(reason: str) -> str:
    """What to change so that a block is rewritten.

    Args:
        reason: why it was not.
    """
    if "; " in reason and not re.search("validation refused", reason):
        return reason.rpartition("; ")[2]  # it says so itself
    return next((remedy for pattern, remedy in _OF_REASONS if re.search(pattern, reason)), _REPORT_IT)


_OF_KERNELS: tuple[tuple[str, str], ...] = (
    (r"dtype", "run the model in float32 or bfloat16"),
    (r"stored \[in, out\]|contiguous", "store the weights of each expert as [out, in], contiguous"),
    (r"not all weights are packed|different patterns", "give all projections of a block the same pattern"),
)


def remedy_for_kernel(reason: str) -> str:
    """What to change so that a kernel computes a block; empty if nothing is wrong."""
    return next((remedy for pattern, remedy in _OF_KERNELS if re.search(pattern, reason)), "")


def advise(blocks: Iterable[BlockReport]) -> None:
    """Fill in the remedies of blocks that were left as they are."""
    for block in blocks:
        block.remedy = "" if block.rewritten else remedy_for_block(block.reason or "")
