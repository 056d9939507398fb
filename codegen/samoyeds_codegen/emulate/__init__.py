"""Run generated CUDA on the CPU, thread by thread, and find what is wrong with it.

    emulate.run(text, "kernel", grid=(4,), block=(128,), shared_bytes=8192, arguments=[x, emulate.Output(y), 256])

The text itself is compiled with the machine's C++ compiler against headers of ours. Every thread is a fiber; plain
loads and stores are seen through the compiler's sanitizer hooks, instructions through ``ptx::`` wrappers with the
semantics of the PTX ISA. Asynchronous work lands as late as it may, and a seed decides the order of threads, so that a
missing wait, fence or barrier is an error of its own class (`errors`) and not luck. See docs/emulator.md.
"""

from samoyeds_codegen.emulate.buffers import Argument, Output
from samoyeds_codegen.emulate.errors import (
    BarrierError,
    DeadlockError,
    DivergenceError,
    EmulationError,
    InFlightError,
    MetadataError,
    MisalignedError,
    MissingFenceError,
    OperandError,
    OutOfBoundsError,
    RaceError,
    UninitialisedError,
)
from samoyeds_codegen.emulate.launch import run

__all__ = [
    "Argument",
    "BarrierError",
    "DeadlockError",
    "DivergenceError",
    "EmulationError",
    "InFlightError",
    "MetadataError",
    "MisalignedError",
    "MissingFenceError",
    "OperandError",
    "OutOfBoundsError",
    "Output",
    "RaceError",
    "UninitialisedError",
    "run",
]
