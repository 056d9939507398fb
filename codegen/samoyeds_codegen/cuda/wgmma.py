"""The text of ``wgmma.mma_async.sp``: an instruction with as many operands as a thread has sums.

Source: PTX ISA, "wgmma.mma_async.sp"; the form ``m64nNk32`` for 16-bit floats. The second matrix is in shared memory,
the first one there or in registers.
"""

from __future__ import annotations

_PTX = {"bfloat16": "bf16", "float16": "f16"}
_SUMS_A_LINE = 8


def wgmma_sp(dtype: str, tokens: int, registers: bool = False) -> str:
    """``ptx::wgmma_sp`` or ``ptx::wgmma_sp_registers`` for both metadata selectors.

    Args:
        dtype: of both matrices.
        tokens: N, the columns of the second one.
        registers: whether they hold the first one.
    """
    functions = (_function(dtype, tokens, selector, registers) for selector in (0, 1))
    return "\n".join(["#ifndef SAMOYEDS_EMULATED", "namespace ptx {", *functions, "}  // namespace ptx", "#endif"])


def _function(dtype: str, tokens: int, selector: int, registers: bool) -> str:
    sums, of_a = tokens // 2, 4 if registers else 1
    first, b, metadata = sums, f"%{sums + of_a}", f"%{sums + of_a + 1}"
    name, kind = ("wgmma_sp_registers", "const uint32_t (&a)[4]") if registers else ("wgmma_sp", "uint64_t a")
    a = "{" + ", ".join(f"%{first + i}" for i in range(4)) + "}" if registers else f"%{first}"
    transposed = "0" if registers else "0, 0"  # only matrices in shared memory can be
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4)) if registers else '"l"(a)'
    form = f"m64n{tokens}k32.f32.{_PTX[dtype]}.{_PTX[dtype]}"
    operands = _lines([f"%{i}" for i in range(sums)], ",", '      "', ('"', ',"'))
    outputs = _lines([f'"+f"(d[{i}])' for i in range(sums)], ", ", "        ", ("", ","))
    return f"""template <>
DEVICE void {name}<{dtype}, {tokens}, {selector}>(
    float (&d)[{sums}], {kind}, uint64_t b, uint32_t metadata) {{
  asm volatile(
      "wgmma.mma_async.sp.sync.aligned.{form} {{"
{operands}
      "}}, {a}, {b}, {metadata}, {selector}, 1, 1, 1, {transposed};"
      :
{outputs}
      : {inputs}, "l"(b), "r"(metadata));
}}"""


def _lines(parts: list[str], separator: str, before: str, after: tuple[str, str]) -> str:
    """The parts, some to a line; the last line ends with the first of ``after``, the others with the second."""
    rows = [parts[i : i + _SUMS_A_LINE] for i in range(0, len(parts), _SUMS_A_LINE)]
    ends = [after[1]] * (len(rows) - 1) + [after[0]]
    return "\n".join(f"{before}{separator.join(row)}{end}" for row, end in zip(rows, ends, strict=True))
