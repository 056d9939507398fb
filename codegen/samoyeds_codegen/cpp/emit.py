"""The text of a kernel: its specification as constants, then the templates that read them."""

from __future__ import annotations

import functools
from pathlib import Path

from samoyeds_codegen.cpp.activation import to_cpp
from samoyeds_codegen.cpp.isa import Isa
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec, ProductSpec, strip_rows

Spec = ExpertsSpec | DenseExpertsSpec | ProductSpec

TEMPLATES = Path(__file__).parent / "templates"
_INCLUDES = "algorithm array atomic cmath cstdint cstring exception new type_traits utility vector omp.h".split()
_WEIGHT = {"float32": "float", "bfloat16": "bf16"}
_AMX = ["amx_sizes.h", "amx_unit.h"]
"""What kernels for the matrix unit share."""
_PANEL = 16
"""Output rows that are computed together, but of strips."""


def emit(spec: Spec, isa: Isa) -> str:
    """C++ of one kernel for one instruction set; the same text for the same arguments."""
    includes = [*_INCLUDES, *(["immintrin.h"] if isa.features else [])]
    if isinstance(spec, ExpertsSpec):
        constants, many = _packed_constants(spec), isa.many
        weights, kernels = _packed_weights(spec, isa), _packed_kernels(spec, isa)
    else:
        constants, many = _dense_constants(spec), _many(spec, isa)
        order = "columns" if spec.by_columns else "rows"
        weights, kernels = ["dense_matrix.h", isa.header, f"dense_{order}.h"], _dense_kernels(spec, order, isa)
    parts = [
        f"// Samoyeds experts: {spec}, for {isa.name}.\n// Generated, do not edit.",
        "\n".join(f"#include <{name}>" for name in includes),
        "namespace samoyeds {",
        template("numbers.h"),
        _constants(spec, [*constants, _row(spec, isa)]),
        *map(template, ("prelude.h", "streams.h", "functions.h")),
        _activation(spec),
        *map(template, (*weights, "arguments.h", "plan.h", "epilogue.h", "dot_rows.h", *kernels)),
        f"namespace many = {many};",
        *_driver(spec, isa),
    ]
    return "\n\n".join(parts) + "\n"


def _many(spec: DenseExpertsSpec | ProductSpec, isa: Isa) -> str:
    """The kernel for experts with many tokens, as a namespace."""
    if isinstance(spec, ProductSpec) and spec.product == "linear" and spec.by_columns and isa.unit != "amx":
        return "wide"
    return "amx" if isa.unit else "gemm"


def _driver(spec: Spec, isa: Isa) -> list[str]:
    """What calls the kernels."""
    if not isinstance(spec, ProductSpec):
        return [template("block.h"), template("entry.h")]
    name = spec.product.capitalize()
    using = f"using Product = {name};\nusing Call = {name}Call;"
    parts = ["linear.h"] if spec.product == "linear" else _outer(isa)
    return [*map(template, ("products.h", *parts)), using, template("products_entry.h")]


def _outer(isa: Isa) -> list[str]:
    tiles = [f"outer_{isa.unit}.h", "outer_pairs.h"] if isa.unit else ["outer_gemm.h"]
    return ["outer_sides.h", *tiles, "outer.h"]


def _packed_weights(spec: ExpertsSpec, isa: Isa) -> list[str]:
    header = [isa.header, f"strips_{isa.header}", "strips.h"] if spec.strips else ["packed.h", isa.header]
    return ["packed_matrix.h", *header]


def _packed_kernels(spec: ExpertsSpec, isa: Isa) -> list[str]:
    unit = _AMX if isa.many == "amx" else []
    if spec.strips:
        kept = _kept(spec, isa)
        many = unit or [f"strips_spmm_{kept}.h"]
        return [f"strips_{kept}.h", "strips_dot.h", *many, f"strips_{isa.many}.h"]
    return ["dot.h", "dot_panels.h", *unit, *(["amx_tiles.h"] if unit else []), f"{isa.many}.h"]


def _kept(spec: Spec, isa: Isa) -> str:
    """As what weights are multiplied where tokens are few."""
    can = spec.strips if isinstance(spec, ExpertsSpec) else not spec.by_columns
    return "pairs" if can and isa.pairs else "floats"


def _row(spec: Spec, isa: Isa) -> str:
    row = "bf16" if _kept(spec, isa) == "pairs" else "float"
    return f"using Row = {row};  // what a row of few tokens is made of"


def _dense_kernels(spec: DenseExpertsSpec | ProductSpec, order: str, isa: Isa) -> list[str]:
    rows = [] if spec.by_columns else [f"dense_rows_{_kept(spec, isa)}.h"]
    few = [*rows, f"dense_{order}_dot.h", *(["dot_panels.h"] if rows else [])]
    if _many(spec, isa) == "wide":
        return [*few, f"linear_wide_{'pairs' if isa.pairs else 'floats'}.h", "linear_wide.h"]
    if not isa.unit:
        return [*few, "dense_gemm.h"]
    tiles = ["amx_sizes.h", f"{isa.unit}_unit.h", "amx_tiles.h", "dense_panels.h", f"dense_{order}_amx.h"]
    return [*few, *tiles, f"dense_block_{isa.unit}.h", "dense_amx.h"]


def _constants(spec: Spec, more: list[str]) -> str:
    gated = f"constexpr bool GATED = {str(spec.gated).lower()};"
    return "\n".join([*more, *spec.layouts.constants, gated, f"using Weight = {_WEIGHT[spec.dtype]};"])


def _packed_constants(spec: ExpertsSpec) -> list[str]:
    return [
        f"constexpr int N = {spec.n}, M = {spec.m}, V = {spec.vector}, GROUP = {spec.group};",
        _panel(strip_rows(spec.n, spec.m) if spec.strips else _PANEL),
        *_grain(4, 4),
    ]


def _dense_constants(spec: DenseExpertsSpec | ProductSpec) -> list[str]:
    # By columns memory is read in longer pieces if more panels are taken at once.
    order = f"constexpr bool BY_COLUMNS = {str(spec.by_columns).lower()};"
    return [order, _panel(_PANEL), *(_grain(1, 512) if spec.by_columns else _grain(4, 4))]


def _panel(rows: int) -> str:
    return f"constexpr int PANEL = {rows};  // output rows that are computed together"


def _grain(shares: int, panels: int) -> list[str]:
    """How work is cut."""
    return [
        f"constexpr int64_t SHARES = {shares};  // pieces of a matrix for each thread",
        f"constexpr int64_t GRAIN = {panels};  // panels that are taken at once, at most",
    ]


def _activation(spec: Spec) -> str:
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
