"""The constants of a machine that costs are made of: measured by ``samoyeds doctor --calibrate``, or defaults."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samoyeds_codegen import build
from samoyeds_codegen.cpp.isa import AMX, PAIRS, usable_isas
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_codegen.errors import CacheError
from samoyeds_compile.layout import measured
from samoyeds_compile.layout.rates import Kernel, Rates

logger = logging.getLogger(__name__)
VERSION = 1
"""Of the file."""
_FILE = "machine.json"


@dataclass(frozen=True)
class Constants:
    """What the costs of a region with one kernel are made of; ``move`` and ``turn`` are those of `Machine`."""

    kernel: Kernel
    move: float
    turn: float


@dataclass(frozen=True)
class Machine:
    """What a machine takes for what; times are in picoseconds.

    Attributes:
        kernels: by `kind`.
        library: of PyTorch's products of experts whose weights lie [in, out], by dtype.
        move: to read or write a byte of rows, one after the other.
        turn: to write a byte of rows in the other order.
        call: of a product of PyTorch's.
        start: of one kernel for a whole block, beyond such a call.
        gathered: to read a byte of weights that Inductor gathers for every slot.
        sorted: to read a byte of weights in PyTorch's product of an expert, whose calls take ``call`` each.
        streamed: to read a byte of weights in a kernel for a whole block.
        origin: where the numbers come from.
    """

    kernels: Mapping[str, Kernel]
    library: Mapping[str, Rates]
    move: float = 77.1
    turn: float = 309.0
    call: float = 60e6
    start: float = 100e6
    gathered: float = 1e12 / 17e9
    sorted: float = 1e12 / 15e9
    streamed: float = 1e12 / 21e9
    origin: str = field(default="defaults", compare=False)

    def constants(self, kind: str) -> Constants:
        """Of the costs of a region with this kernel."""
        return Constants(self.kernels[kind], self.move, self.turn)


def kind(spec: ExpertsSpec | DenseExpertsSpec) -> str:
    """Which kernels share constants: by dtype of the weights and how they are stored."""
    if isinstance(spec, DenseExpertsSpec):
        return f"{spec.dtype} {'columns' if spec.by_columns else 'dense'}"
    skips = (spec.n, spec.m) == (1, 2) and spec.vector >= 32 and spec.group % 16 == 0
    return f"{spec.dtype} {spec.n}:{spec.m}{'/16' * skips}{' strips' * spec.strips}"


FORMS = ("dense", "columns", "1:1", "1:2", "2:4", "1:2/16", "1:1 strips", "1:2 strips", "2:4 strips", "1:2/16 strips")
KINDS = tuple(f"{dtype} {form}" for dtype in ("float32", "bfloat16") for form in FORMS)


def here() -> Machine:
    """What was measured on this machine, or the defaults for its instructions; read once a process."""
    return _stored(str(_path())) or defaults()


@functools.cache
def defaults() -> Machine:
    """Measured on two machines, with a matrix unit and without.

    Where nothing multiplies bfloat16 it takes what float32 takes.
    """
    isa = usable_isas("bfloat16")[0]
    if isa == AMX:
        return Machine(measured.AMX_KERNELS, measured.AMX_LIBRARY)
    if isa == PAIRS:
        return Machine(measured.PAIRS_KERNELS, measured.PAIRS_LIBRARY, move=49.9, turn=148.4)
    known = measured.AMX_KERNELS
    return Machine({name: known[name.replace("bfloat16", "float32")] for name in known}, measured.AMX_LIBRARY)


def store(machine: Machine) -> Path:
    """Keep what was measured for later processes; returns where.

    Raises:
        CacheError: there is no folder for it that is the user's alone.
    """
    path = build.cache_directory().parent / _FILE
    text = json.dumps({"version": VERSION, "isas": _isas(), **dataclasses.asdict(machine)}, indent=1)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(name, path)
    _stored.cache_clear()
    return path


@functools.cache
def _stored(path: str) -> Machine | None:
    """What a file holds, unless it is another's, another version's or another machine's."""
    try:
        status = os.stat(path)
        if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o022:
            raise ValueError("others may write it")
        found = json.loads(Path(path).read_text())
        if (found.pop("version"), found.pop("isas")) != (VERSION, _isas()):
            return None
        kernels = {k: Kernel(Rates(**v["rows"]), Rates(**v["tiles"])) for k, v in found.pop("kernels").items()}
        library = {k: Rates(**v) for k, v in found.pop("library").items()}
        return Machine(kernels, library, **found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s cannot be read (%s); run samoyeds doctor --calibrate", path, error)
        return None


def _path() -> Path:
    """Beside the folder of kernels; readers look at whose the file is."""
    try:
        return build.cache_directory().parent / _FILE
    except CacheError:  # then nothing is kept
        return Path(os.devnull) / _FILE


def _isas() -> list[str]:
    """By which a machine is told from another."""
    return [usable_isas(dtype)[0].name for dtype in ("float32", "bfloat16")]
