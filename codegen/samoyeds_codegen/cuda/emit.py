"""The text of a kernel: its specification as constants, then the templates that read them."""

from __future__ import annotations

import functools
from pathlib import Path

from samoyeds_codegen.cpp.activation import to_cpp
from samoyeds_codegen.cuda import layout
from samoyeds_codegen.cuda.arguments import arguments_of
from samoyeds_codegen.cuda.spec import CombineSpec, KernelSpec, ProjectionSpec, RouteSpec
from samoyeds_codegen.cuda.wgmma import wgmma_sp

TEMPLATES = Path(__file__).parent / "templates"
ENTRY = "samoyeds_kernel"
"""What every kernel is called in its cubin."""
_TYPE = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}


def emit(spec: KernelSpec) -> str:
    """CUDA of one kernel; the same text for the same specification."""
    head = f"// Samoyeds {spec}. Generated, do not edit."
    parts = [template(part) if part.endswith(".cuh") else part for part in _parts(spec)]
    return "\n\n".join([head, *parts]) + "\n"


def _parts(spec: KernelSpec) -> list[str]:
    """Names of templates, and texts made here."""
    arguments = arguments_of(spec).to_cuda()
    if isinstance(spec, RouteSpec):
        parts = [_route_constants(spec), "tile.cuh", arguments, "route.cuh"]
    elif isinstance(spec, CombineSpec):
        parts = [_combine_types(spec), arguments, "combine.cuh"]
    else:
        parts = [_constants(spec), "tile.cuh", arguments, *_projection(spec)]
    instructions = ["ptx.cuh"]
    if isinstance(spec, ProjectionSpec) and spec.wgmma:
        instructions.append(wgmma_sp(spec.dtype, spec.tokens, spec.variant.in_registers))
    return ["numbers.cuh", *instructions, "namespace samoyeds {", *parts, "}  // namespace samoyeds"]


def _projection(spec: ProjectionSpec) -> list[str]:
    rows = f"rows_{spec.pattern.n}_{spec.pattern.m}{'_direct' if spec.direct else ''}.cuh"
    write = "write_gated.cuh" if spec.gated else "write_plain.cuh"
    kernel = [f"weights_{spec.variant.weights}.cuh", "wgmma.cuh"] if spec.wgmma else ["mma.cuh"]
    epilogue = ["functions.cuh", _activation(spec), "store.cuh", write, "epilogue.cuh"]
    return ["place.cuh", "tokens.cuh", "weights.cuh", "sums.cuh", rows, *epilogue, *kernel]


def _constants(spec: ProjectionSpec) -> str:
    pattern = spec.pattern
    whole = {
        "TOKENS": spec.tokens,
        "ROW_TILES": spec.row_tiles,
        "STAGES": spec.stages,
        "COLUMNS": layout.COLUMNS,
        "VECTOR": pattern.vector,
        "KEPT_ROWS": pattern.n,
        "GROUP": pattern.group,
        "SETS": pattern.sets,
        "DENSE_ROWS": pattern.dense_rows,
        "VALUE_BYTES": spec.value_bytes,
        "PIECE_BYTES": spec.piece_bytes,
        "CLUSTER": spec.cluster,
    }
    flags = {
        "GATHER": spec.op == "up", "GATED": spec.gated, "BIAS": spec.bias, "SHARED": spec.shared, "DIRECT": spec.direct,
        "IN_REGISTERS": spec.variant.in_registers, "WEIGHTS_SHARED": spec.variant.shares_weights,
        "TOKENS_SHARED": spec.variant.shares_tokens,
    }  # fmt: skip
    lines = [f"constexpr int {name} = {value};" for name, value in whole.items()]
    lines += [f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]
    attribute = f" __cluster_dims__({spec.cluster}, 1, 1)" if spec.cluster > 1 else ""
    lines.append(f"#define SAMOYEDS_CLUSTER{attribute}")
    offsets = [offset.to_cuda() for offset in (layout.VALUE, layout.METADATA)]
    return "\n".join([f"using Element = {_TYPE[spec.dtype]};", *lines, *offsets])


def _route_constants(spec: RouteSpec) -> str:
    whole = {"EXPERTS": spec.experts, "BUCKET_BITS": spec.experts.bit_length(), "TOKENS": spec.tokens}
    lines = [f"constexpr int {name} = {value};" for name, value in whole.items()]
    return "\n".join([f"using Id = {spec.ids}_t;", *lines])


def _combine_types(spec: CombineSpec) -> str:
    types = {"Element": spec.dtype, "Weight": spec.weights, "Result": spec.out}
    return "\n".join(f"using {name} = {_TYPE[dtype]};" for name, dtype in types.items())


def _activation(spec: ProjectionSpec) -> str:
    parameters = "float gate, float up" if spec.gated else "float x"
    body = f"DEVICE float activate({parameters}) {{ return {to_cpp(spec.activation)}; }}"
    return f"// {spec.activation}\n{body}"


@functools.cache
def template(name: str) -> str:
    """The text of a file in ``templates/``."""
    return (TEMPLATES / name).read_text().strip()
