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
from samoyeds_codegen.cpp.isa import AMX, usable_isas
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_codegen.errors import CacheError

logger = logging.getLogger(__name__)
VERSION = 1
"""Of the file."""
_FILE = "machine.json"


@dataclass(frozen=True)
class Rates:
    """Picoseconds that a product takes for each weight of an expert, ``max(read, step + mac * tokens)``.

    Attributes:
        read: what it takes at least, to get the weight from memory.
        step: what does not depend on the tokens, such as unpacking.
        mac: for each token.
        lanes: tokens are computed in multiples of it.
    """

    read: float
    step: float
    mac: float
    lanes: int = 1


@dataclass(frozen=True)
class Kernel:
    """A kernel of experts: ``rows`` for few tokens, token-major, and ``tiles`` for many, feature-major."""

    rows: Rates
    tiles: Rates


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
    """Measured on one machine with AVX-512 and AMX. Without a matrix unit bfloat16 takes what float32 takes."""
    if usable_isas("bfloat16")[0] == AMX:
        return Machine(KERNELS, LIBRARY)
    vectors = {name: KERNELS[name.replace("bfloat16", "float32")] for name in KERNELS}
    return Machine(vectors, LIBRARY)


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


KERNELS: Mapping[str, Kernel] = {
    "float32 dense": Kernel(Rates(275.4, 227.0, 15.94), Rates(450.3, 270.3, 12.22, 16)),
    "float32 columns": Kernel(Rates(359.6, 170.4, 28.03), Rates(1561.0, 1375.1, 13.16, 16)),
    "float32 1:1": Kernel(Rates(166.6, 75.5, 20.76), Rates(360.4, 176.1, 11.06, 16)),
    "float32 1:2": Kernel(Rates(106.1, 50.7, 12.59), Rates(205.7, 109.9, 6.08, 16)),
    "float32 2:4": Kernel(Rates(106.4, 54.5, 12.38), Rates(202.5, 93.5, 6.93, 16)),
    "float32 1:2/16": Kernel(Rates(108.3, 52.3, 12.64), Rates(208.4, 114.0, 6.74, 16)),
    "bfloat16 dense": Kernel(Rates(183.9, 146.5, 15.79), Rates(182.0, 150.9, 3.17, 16)),
    "bfloat16 columns": Kernel(Rates(177.7, 56.7, 26.61), Rates(657.4, 634.2, 2.75, 16)),
    "bfloat16 1:1": Kernel(Rates(127.2, 46.5, 20.24), Rates(192.4, 161.9, 2.77, 16)),
    "bfloat16 1:2": Kernel(Rates(71.6, 32.4, 12.66), Rates(129.2, 97.4, 3.05, 16)),
    "bfloat16 2:4": Kernel(Rates(76.3, 35.4, 13.00), Rates(136.6, 93.6, 3.14, 16)),
    "bfloat16 1:2/16": Kernel(Rates(75.0, 31.3, 12.67), Rates(127.5, 106.6, 2.27, 16)),
    "bfloat16 1:2 strips": Kernel(Rates(63.6, 32.1, 8.12), Rates(72.5, 52.3, 2.62)),
    "float32 1:2 strips": Kernel(Rates(99.2, 70.0, 7.66), Rates(180.7, 102.5, 5.37, 16)),
    "bfloat16 1:1 strips": Kernel(Rates(102.2, 49.9, 11.94), Rates(110.6, 85.8, 3.71)),
    "float32 1:1 strips": Kernel(Rates(168.0, 108.6, 12.28), Rates(331.4, 177.2, 9.56, 16)),
    "bfloat16 2:4 strips": Kernel(Rates(68.0, 40.5, 8.46), Rates(87.9, 70.7, 3.09)),
    "float32 2:4 strips": Kernel(Rates(98.0, 64.7, 8.61), Rates(193.8, 116.7, 4.74, 16)),
    "bfloat16 1:2/16 strips": Kernel(Rates(66.9, 31.6, 11.11), Rates(73.6, 55.6, 2.29)),
    "float32 1:2/16 strips": Kernel(Rates(99.7, 62.4, 9.80), Rates(179.3, 105.0, 5.07, 16)),
}
LIBRARY: Mapping[str, Rates] = {
    "float32": Rates(343.8, 618.3, 16.92),
    "bfloat16": Rates(396.3, 361.9, 3.54),
}
