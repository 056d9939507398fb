"""Instruction sets: what a variant of a kernel is compiled for, and which of them this machine runs."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

X86 = ("x86_64", "AMD64")


@dataclass(frozen=True)
class Isa:
    """One variant.

    Attributes:
        name: for reports and file names.
        header: the template with its vectors.
        flags: of the compiler, beside those that all kernels get.
        features: what ``/proc/cpuinfo`` must list.
        dtypes: of weights, that the variant is for.
        many: the kernel for experts with many tokens, a template and its namespace.
        unit: what multiplies tiles of dense bfloat16 weights, as part of names of templates; empty: nothing does.
    """

    name: str
    header: str
    flags: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    many: str = "spmm"
    unit: str = ""

    @property
    def pairs(self) -> bool:
        """Whether vectors multiply pairs of bfloat16."""
        return "avx512_bf16" in self.features


def _isa(name: str, header: str, *features: str, **more: Any) -> Isa:
    """An x86 variant whose flags are the features, spelled as compilers do."""
    flags = ("-m" + feature.replace("512_", "512").replace("_", "-") for feature in features)
    return Isa(name, header, tuple(flags), frozenset(features), **more)


_BASE = ("avx2", "fma")
_AVX512 = (*_BASE, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_PAIRS = (*_AVX512, "avx512_vbmi2", "avx512_bf16")
_AMX = (*_PAIRS, "amx_tile", "amx_bf16")
AMX = _isa("avx512_amx", "avx512.h", *_AMX, dtypes=("bfloat16",), many="amx", unit="amx")
PAIRS = _isa("avx512_bf16", "avx512.h", *_PAIRS, dtypes=("bfloat16",), unit="vector")
AVX512 = _isa("avx512", "avx512.h", *_AVX512)
AVX2 = _isa("avx2", "avx2.h", *_BASE)
PORTABLE = Isa("portable", "portable.h")
ISAS = (AMX, PAIRS, AVX512, AVX2, PORTABLE)
"""Best first."""


def usable_isas(dtype: str) -> tuple[Isa, ...]:
    """Those for a dtype that this machine runs, best first; asked at run time, so that no cache carries an answer."""
    return tuple(isa for isa in ISAS if dtype in isa.dtypes and runs_here(isa))


def runs_here(isa: Isa) -> bool:
    """Whether this machine runs a variant; nothing may be called that was not asked about, as AMX is granted by it."""
    return not missing(isa)


def missing(isa: Isa) -> frozenset[str]:
    """What a variant needs and this machine lacks."""
    return isa.features - _features()


@functools.cache
def _features() -> frozenset[str]:
    """What the processor can do and the system lets programs do."""
    if platform.machine() not in X86:
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return _features_of_torch()
    found = set(next((line for line in lines if line.startswith("flags")), "").partition(":")[2].split())
    return frozenset(found if "amx_tile" not in found or _allow_amx() else found - {"amx_tile"})


def _allow_amx() -> bool:
    """Whether the system lets this process use the matrix unit: it must be asked, once."""
    return bool(torch.cpu._init_amx())


def _features_of_torch() -> frozenset[str]:
    """Where there is no ``/proc/cpuinfo``: torch's own choice of vectors."""
    capability = torch.backends.cpu.get_cpu_capability()
    return frozenset({"AVX512": _AVX512, "AVX2": _BASE}.get(capability, ()))
