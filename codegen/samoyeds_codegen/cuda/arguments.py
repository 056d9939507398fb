"""The one parameter of each kernel, a struct by value: named once, printed as CUDA and packed as bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from samoyeds_codegen.cuda.spec import KernelSpec, ProjectionSpec, RouteSpec

_CODES = {"int64_t": "q", "int32_t": "i"}


@dataclass(frozen=True)
class Arguments:
    """Fields of a struct in order: type, name, and what it is. Pointers and 64-bit numbers come first: no padding."""

    fields: tuple[tuple[str, str, str], ...]

    @property
    def format(self) -> str:
        """As `struct` writes it."""
        return "<" + "".join("Q" if kind.endswith("*") else _CODES[kind] for kind, _, _ in self.fields)

    def pack(self, values: Mapping[str, int]) -> bytes:
        """The struct, with pointers as addresses; fields and values must have the same names."""
        if unlike := {name for _, name, _ in self.fields} ^ values.keys():
            raise TypeError(f"arguments {sorted(unlike)} are missing or unknown")
        return struct.pack(self.format, *(values[name] for _, name, _ in self.fields))

    def to_cuda(self) -> str:
        """The struct's declaration."""
        lines = [f"  {kind} {name};  // {what}" for kind, name, what in self.fields]
        return "\n".join(["struct Arguments {", *lines, "};"])


def _matrix(prefix: str, what: str) -> tuple[tuple[str, str, str], ...]:
    """Canonical storage of a matrix of all experts; rows follow one another without a gap."""
    return (
        ("const Element*", f"{prefix}values", f"{what}: [experts][rows][width / 2], 16-byte aligned"),
        ("const uint16_t*", f"{prefix}metadata", "[experts][rows][width / 16], 4-byte aligned"),
        ("const uint8_t*", f"{prefix}selection", "[experts][all rows / GROUP][width / VECTOR]; not for 1:1"),
        ("const Element*", f"{prefix}bias", "[experts][features], or null"),
        ("int64_t", f"{prefix}values_expert", "from one expert to the next, as the following three"),
        ("int64_t", f"{prefix}metadata_expert", ""),
        ("int64_t", f"{prefix}selection_expert", ""),
        ("int64_t", f"{prefix}bias_expert", ""),
    )


PROJECTION = Arguments(
    (
        ("const Element*", "x", "[tokens or slots][columns], 16-byte aligned"),
        *_matrix("", "the only matrix, or that of the gate"),
        *_matrix("up_", "what the gate is for; not without one"),
        ("const int64_t*", "order", "[slots]: the place of a slot in [tokens][top_k]; up only"),
        ("const Tile*", "tiles", "as route.cuh makes them"),
        ("const int32_t*", "tile_count", "how many there are"),
        ("Element*", "out", "[slots][all features of row_tiles]"),
        ("int64_t", "x_stride", "a multiple of 8"),
        ("int64_t", "out_stride", "a multiple of 2"),
        ("int32_t", "features", "of out that are not padding"),
        ("int32_t", "columns", "of x, a multiple of 8; zeros are taken for what is beyond"),
        ("int32_t", "rows", "condensed rows of a matrix"),
        ("int32_t", "width", "stored columns, a multiple of 32"),
        ("int32_t", "column_blocks", "of 128 columns"),
        ("int32_t", "row_tiles", "of 64 condensed rows of all matrices, a multiple of ROW_TILES"),
        ("int32_t", "up_first_block", "the block of rows of up_selection at which up_values begin"),
        ("int32_t", "top_k", "choices of a token"),
    )
)
ROUTE = Arguments(
    (
        ("const Id*", "ids", "[slots]: the expert of each"),
        ("int64_t*", "order", "[slots]: which slot comes there, sorted by expert"),
        ("int64_t*", "places", "[slots]: the inverse"),
        ("int32_t*", "offsets", "[experts]: where each expert's slots end"),
        ("Tile*", "tiles", "as many as there can be"),
        ("int32_t*", "tile_count", "how many there are"),
        ("int32_t", "slots", ""),
        ("int32_t", "unused", "makes the size a multiple of 8"),
    )
)
COMBINE = Arguments(
    (
        ("const Element*", "rows", "[slots][row_stride], 16-byte aligned"),
        ("const Weight*", "weights", "[tokens][top_k]"),
        ("const int64_t*", "slots", "[tokens][top_k]: the slot of a choice"),
        ("const int32_t*", "owned", "slots from this number on are nobody's"),
        ("Result*", "out", "[tokens][columns]"),
        ("int64_t", "row_stride", "a multiple of 8"),
        ("int32_t", "columns", "at most row_stride"),
        ("int32_t", "top_k", "choices of a token"),
    )
)


def arguments_of(spec: KernelSpec) -> Arguments:
    """What the kernel of a specification is given."""
    if isinstance(spec, ProjectionSpec):
        return PROJECTION
    return ROUTE if isinstance(spec, RouteSpec) else COMBINE
