"""What the machine code of a cubin holds, as the disassembler in the triton wheel tells it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from samoyeds_codegen.errors import CompilerNotFoundError

SECONDS = 120
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Sass:
    """Facts about one kernel.

    Attributes:
        opcodes: each instruction in order, without operands.
        registers: of a thread.
        stack, local: bytes of a thread that do not fit registers.
        static_shared: bytes of shared memory that are fixed at compile time, without the dynamic part.
    """

    opcodes: tuple[str, ...]
    registers: int
    stack: int
    static_shared: int
    local: int

    def count(self, *parts: str) -> int:
        """How many instructions have all these parts, as ``count("HMMA", "SP")``."""
        return sum(all(part in opcode.split(".") for part in parts) for opcode in self.opcodes)

    @property
    def sparse(self) -> int:
        """Sparse matrix instructions of a warp or a warpgroup."""
        return self.count("HMMA", "SP") + self.count("HGMMA", "SP")

    @property
    def spills(self) -> int:
        """Instructions that move registers to local memory or back."""
        return self.count("STL") + self.count("LDL")

    @property
    def wide_copies(self) -> int:
        """Copies from global to shared memory of 16 bytes a thread, or by the bulk engine."""
        return self.count("LDGSTS", "128") + self.count("UBLKCP")

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes from global memory."""
        return self.count("LDG", "128")


def disassemble(cubin: Path) -> Sass:
    """Read a cubin with one kernel.

    Raises:
        CompilerNotFoundError: there is no ``cuobjdump``.
        ValueError: the file is no such cubin.
    """
    command = [find_cuobjdump(), "--dump-resource-usage", "--dump-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).stdout
    found = _RESOURCES.search(text)
    if found is None:
        raise ValueError(f"{cubin} holds no kernel")
    registers, stack, shared, local = map(int, found.groups())
    return Sass(tuple(_INSTRUCTION.findall(text)), registers, stack, shared, local)


def find_cuobjdump() -> str:
    """The disassembler of the triton wheel, or one on the path.

    Raises:
        CompilerNotFoundError: there is none.
    """
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    except ImportError:
        bundled = Path()
    found = shutil.which("cuobjdump", path=str(bundled)) or shutil.which("cuobjdump")
    if found is None:
        raise CompilerNotFoundError("cuobjdump is missing; the triton wheel brings it: pip install triton")
    return found
