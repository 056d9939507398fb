"""The text of ``wgmma.mma_async.sp``: an instruction with as many operands as a thread has sums.

Source: PTX ISA, "wgmma.mma_async.sp"; the form ``m64nNk32`` for 16-bit floats, both matrices in shared memory.
"""

from __future__ import annotations

_PTX = {"bfloat16": "bf16", "float16": "f16"}
_SUMS_A_LINE = 8


def wgmma_sp(dtype: str, tokens: int) -> str:
    """``ptx::wgmma_sp`` for both metadata selectors.

    Args:
        dtype: of both matrices.
        tokens: N, the columns of the second one.
    """
    functions = (_function(dtype, tokens, selector) for selector in (0, 1))
    return "\n".join(["#ifndef SAMOYEDS_EMULATED", "namespace ptx {", *functions, "}  // namespace ptx", "#endif"])


def _function(dtype: str, tokens: int, selector: int) -> str:
    sums = tokens // 2
    a, b, metadata = (f"%{sums + i}" for i in range(3))
    form = f"m64n{tokens}k32.f32.{_PTX[dtype]}.{_PTX[dtype]}"
    operands = _lines([f"%{i}" for i in range(sums)], ",", '      "', ('"', ',"'))
    outputs = _lines([f'"+f"(d[{i}])' for i in range(sums)], ", ", "        ", ("", ","))
    return f"""template <>
DEVICE void wgmma_sp<{dtype}, {tokens}, {selector}>(float (&d)[{sums}], uint64_t a, uint64_t b, uint32_t metadata) {{
  asm volatile(
      "wgmma.mma_async.sp.sync.aligned.{form} {{"
{operands}
      "}}, {a}, {b}, {metadata}, {selector}, 1, 1, 1, 0, 0;"
      :
{outputs}
      : "l"(a), "l"(b), "r"(metadata));
}}"""


def _lines(parts: list[str], separator: str, before: str, after: tuple[str, str]) -> str:
    """The parts, some to a line; the last line ends with the first of ``after``, the others with the second."""
    rows = [parts[i : i + _SUMS_A_LINE] for i in range(0, len(parts), _SUMS_A_LINE)]
    ends = [after[1]] * (len(rows) - 1) + [after[0]]
    return "\n".join(f"{before}{separator.join(row)}{end}" for row, end in zip(rows, ends, strict=True))
