"""What a kernel can do wrong, one class per cause."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Where:
    """The instruction that failed: of a thread of a block, at a line of the kernel's text (0: unknown).

    ``address`` counts bytes from the start of a global buffer, or is an address of shared memory as PTX sees it.
    """

    kernel: str
    block: tuple[int, ...]
    thread: tuple[int, ...]
    instruction: str
    line: int
    address: int

    def __str__(self) -> str:
        return (
            f"kernel {self.kernel}, block {self.block}, thread {self.thread}, line {self.line}: "
            f"{self.instruction}, address {self.address:#x}"
        )


class EmulationError(Exception):
    """Base of all of them; ``where`` is the instruction, ``detail`` what is wrong with it."""

    def __init__(self, where: Where, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.where = where
        self.detail = detail


class OutOfBoundsError(EmulationError):
    """An access outside of every buffer, or outside of shared memory."""


class MisalignedError(EmulationError):
    """An address or a size that the instruction does not take."""


class UninitialisedError(EmulationError):
    """Memory or a register is read that nothing was written to."""


class RaceError(EmulationError):
    """Two threads access the same bytes, one of them writes, and no barrier orders them."""


class InFlightError(EmulationError):
    """Bytes or registers are touched that a copy or a wgmma under way still reads or writes: a wait is missing."""


class MissingFenceError(EmulationError):
    """fence_proxy_async, wgmma_fence or fence_barrier_init is missing."""


class BarrierError(EmulationError):
    """A barrier with the wrong count, an mbarrier that is not one, or one arrival too many."""


class DeadlockError(EmulationError):
    """No thread can go on; the detail lists what each of them waits for."""


class DivergenceError(EmulationError):
    """Threads of a warp do not execute a warp-wide instruction together."""


class MetadataError(EmulationError):
    """A nibble of sparse metadata whose positions do not ascend."""


class OperandError(EmulationError):
    """A descriptor, count, parity, mask or number that the instruction does not take."""


CLASSES: tuple[type[EmulationError], ...] = (
    EmulationError,
    OutOfBoundsError,
    MisalignedError,
    UninitialisedError,
    RaceError,
    InFlightError,
    MissingFenceError,
    BarrierError,
    DeadlockError,
    DivergenceError,
    MetadataError,
    OperandError,
)
"""By the number of ``Kind`` in runtime/failure.h."""
