"""The text of a kernel: its specification as constants, then the templates that read them."""

from __future__ import annotations

import functools
from pathlib import Path

from samoyeds_codegen.cpp.activation import to_cpp
from samoyeds_codegen.cpp.isa import Isa
from samoyeds_codegen.cpp.spec import ExpertsSpec

TEMPLATES = Path(__file__).parent / "templates"
_INCLUDES = "algorithm array atomic cmath cstdint cstring exception new utility vector omp.h".split()
_WEIGHT = {"float32": "float", "bfloat16": "bf16"}


def emit(spec: ExpertsSpec, isa: Isa) -> str:
    """C++ of one kernel for one instruction set; the same text for the same arguments."""
    includes = [*_INCLUDES, *(["immintrin.h"] if isa.features else [])]
    kernels = [isa.header, "plan.h", "epilogue.h", "dot.h", f"{isa.many}.h"]
    parts = [
        f"// Samoyeds experts: {spec}, for {isa.name}. Generated, do not edit.",
        "\n".join(f"#include <{name}>" for name in includes),
        "namespace samoyeds {",
        template("numbers.h"),
        _constants(spec, isa),
        *map(template, ("arguments.h", "prelude.h", "functions.h")),
        _activation(spec),
        *map(template, kernels),
        f"namespace many = {isa.many};",
        *map(template, ("block.h", "entry.h")),
    ]
    return "\n\n".join(parts) + "\n"


def _constants(spec: ExpertsSpec, isa: Isa) -> str:
    return "\n".join(
        [
            "// n of m sub-rows are kept in vectors of V columns; GROUP blocks of rows share a choice.",
            f"constexpr int N = {spec.n}, M = {spec.m}, V = {spec.vector}, GROUP = {spec.group};",
            f"constexpr bool GATED = {str(spec.gated).lower()};",
            f"constexpr int DOT_TOKENS = {isa.dot_tokens};",
            f"using Weight = {_WEIGHT[spec.dtype]};",
        ]
    )


def _activation(spec: ExpertsSpec) -> str:
    parameters = "float gate, float up" if spec.gated else "float, float x"
    return "\n".join(
        [
            f"// {spec.activation}",
            f"static inline float activate({parameters}) {{",
            f"  return {to_cpp(spec.activation)};",
            "}",
        ]
    )


@functools.cache
def template(name: str) -> str:
    """The text of a file in ``templates/``."""
    return (TEMPLATES / name).read_text().strip()
