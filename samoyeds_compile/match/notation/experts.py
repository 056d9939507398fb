"""The function that an expert computes, read from the elements of its products."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from samoyeds_codegen import expr
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.activation import BINARY, MAX_TEXT, UNARY
from samoyeds_compile.match.notation.contributions import Contribution
from samoyeds_compile.match.notation.index import (
    Index,
    Piece,
    Size,
    add,
    atoms,
    constant,
    flatten,
    of_atom,
    part_sizes,
    scale,
    sizes_of,
)
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Products
from samoyeds_compile.match.notation.projections import Projection, is_parameter, read_projection
from samoyeds_compile.match.notation.reindex import Place, broadcast
from samoyeds_compile.match.region import Decline, require

IsToken = Callable[[Value, tuple[Index, ...], Index], bool]
"""Whether an element, given with its feature index, is the token's own row."""


@dataclass
class ExpertFunction:
    """One contribution's expert, from the token's row to the row it contributes.

    Attributes:
        gate: its first projection beside ``up``, if gate and up are not packed.
        up, down: its projections.
        activation: expression between them.
        layout: where gate and up lie.
        x: the row that goes in, an element with the feature index last.
        inputs: elements that the row is multiplied with on the way in.
        scale: a number that it is multiplied with.
    """

    gate: Projection | None
    up: Projection
    down: Projection
    activation: str
    layout: str
    x: Place
    inputs: tuple[Place, ...] = ()
    scale: float = 1.0

    @property
    def projections(self) -> list[Projection]:
        """Gate (if there is one), up and down."""
        return [p for p in (self.gate, self.up, self.down) if p is not None]

    @property
    def experts(self) -> list[Index | None]:
        """The index of the expert in the stack of each projection."""
        return [p.weight.expert for p in self.projections]

    @property
    def expert(self) -> Index | None:
        """The index of the expert in the stacks; None where the weights are its own."""
        return self.down.weight.expert


class ExpertReader:
    """Reads the function behind one contribution."""

    def __init__(
        self,
        notation: Notation,
        products: Products,
        contribution: Contribution,
        feature: Index,
        leading: tuple[Size, ...],
    ) -> None:
        self.leading = leading  # sizes of the output but the last
        self.notation, self.products = notation, products
        self.contribution, self.feature = contribution, feature
        self.found: list[_Leaf] = []
        rows = [i.atom for i in contribution.index]
        self.piece = next((a for a in rows if isinstance(a, Piece)), None)

    def read(self, is_token: IsToken) -> ExpertFunction:
        """The expert's function; ``is_token(value, index, inner)`` says where its input begins."""
        c = self.contribution
        down = read_projection(self.notation, self.products, c.value, c.index, self.feature, c.bias)
        self.inner = down.inner
        self.width = sizes_of(down.weight.value)[-2 if down.weight.transposed else -1]
        text = self._text(*self._uncast(down.rows))
        up, gate, layout, names = self._projections(down)
        for placeholder, name in names.items():
            text = text.replace(placeholder, name)
        require(len(text) <= MAX_TEXT, "the activation is too long a formula", c.value)
        try:
            text = ast.unparse(expr.parse(text))
        except expr.ExpressionError as error:
            raise Decline("the activation is no elementwise formula", c.value) from error
        require(text != expr.IDENTITY, "nothing stands between the two projections of a row", c.value)
        x, inputs, number = self._source(up, is_token)
        if gate is not None:
            same = self._source(gate, is_token)
            require(_same_source(x, up.inner, same[0], gate.inner) and (inputs, number) == same[1:],
                    "gate and up projection have different inputs", gate.product)  # fmt: skip
        return ExpertFunction(gate, up, down, text, layout, x, inputs, number)

    def _places(self, value: Value, index: tuple[Index, ...]) -> Iterator[Place]:
        """As `Notation.places`, and on through a join of the experts' rows to those of this expert."""
        place: Place | None = (value, index)
        while place is not None:
            *_, place = found = list(self.notation.places(*place))
            yield from found
            place = self._own_part(*place)

    def _own_part(self, value: Value, index: tuple[Index, ...]) -> Place | None:
        if value.op != "cat" or not isinstance(value.input, tuple) or value.arg("dim", 0) != 0:
            return None
        row = self.piece
        if row is None or index[0] != row.index or row.number >= len(value.input):
            return None
        lengths = [sizes_of(part)[0] for part in value.input]
        if lengths != part_sizes(row.split, 0):
            return None
        return value.input[row.number], (of_atom(row), *index[1:])

    def _uncast(self, place: Place) -> Place:
        """The activated rows before the cast to the dtype of the second product."""
        for value, index in self._places(*place):
            if value.op in ("to", "type_as") and isinstance(value.input, Value):
                return self._uncast((value.input, index))
            place = (value, index)
            if value.op in _STOPS or self.products.is_product(value):
                break
        return place

    # ------------------------------------------------------------------------------- activation

    def _text(self, value: Value, index: tuple[Index, ...]) -> str:
        for place in self._places(value, index):
            text = self._leaf(*place) or self._operation(*place)
            if text is not None:
                require(len(text) <= MAX_TEXT, "the activation is too long a formula", value)
                return text
        raise Decline(f"{value.op} in the activation is not known to be elementwise", value)

    def _leaf(self, value: Value, index: tuple[Index, ...]) -> str | None:
        """A projection, with its bias if one is added to it."""
        if self.products.is_product(value):
            return self._projected(value, index, None)
        if value.op != "add" or value.arg("alpha", 1) != 1:
            return None
        operands = [value.input, value.arg("other")]
        if not all(isinstance(o, Value) and o.is_tensor for o in operands):
            return None
        places = [(o, broadcast(index, o)) for o in operands]
        for rows, bias in (places, places[::-1]):
            product = self._product(*rows)
            end = self._end(*bias)
            if product is not None and is_parameter(end[0]):
                return self._projected(*product, bias)
        return None

    def _product(self, value: Value, index: tuple[Index, ...]) -> Place | None:
        places = self._places(value, index)
        return next((p for p in places if self.products.is_product(p[0])), None)

    def _end(self, value: Value, index: tuple[Index, ...]) -> Place:
        *_, place = self._places(value, index)
        return place

    def _projected(self, value: Value, index: tuple[Index, ...], bias: Place | None) -> str:
        mentions = [p for p, i in enumerate(index) if self._mentions_inner(i)]
        if not self.inner.terms and not mentions:
            mentions = [p for p, n in enumerate(sizes_of(value)) if n in (1, 2)][-1:]
        require(len(mentions) == 1, "the features of a projection are not understood", value)
        at = mentions[0]
        general = None if bias is None else (bias[0], tuple(None if i == index[at] else i for i in bias[1]))
        for known in self.found:
            if known.value is value and known.others() == _others(index, at) and known.bias == general:
                return known.name(index[at])
        leaf = _Leaf(value, index, at, general, len(self.found))
        self.found.append(leaf)
        return leaf.name(index[at])

    def _mentions_inner(self, index: Index) -> bool:
        wanted = self.inner.atom
        return any(a == wanted for a in atoms(index))

    def _operation(self, value: Value, index: tuple[Index, ...]) -> str | None:
        op = value.op
        if op in BINARY:
            return self._binary(value, index)
        if op in ("to", "type_as"):
            inner = self._operand(value.input, index)
            same = value.dtype == value.input.dtype
            return inner if same else f"to({inner}, {str(value.dtype).removeprefix('torch.')!r})"
        if op in ("clamp", "clamp_min", "clamp_max"):
            bounds = value.arg("min"), value.arg("max")
            require(not any(isinstance(b, Value) for b in bounds), "a clamp has bounds that are tensors", value)
            return f"clamp({self._operand(value.input, index)}, {bounds[0]!r}, {bounds[1]!r})"
        if op == "neg":
            return f"(-{self._operand(value.input, index)})"
        if op == "gelu":
            approximate = value.arg("approximate", "none")
            more = "" if approximate == "none" else f", {approximate!r}"
            return f"gelu({self._operand(value.input, index)}{more})"
        if op == "glu":
            return self._glu(value, index)
        if op in UNARY and not set(value.args) - {"input", "inplace"}:
            return f"{op}({self._operand(value.input, index)})"
        return None

    def _glu(self, value: Value, index: tuple[Index, ...]) -> str | None:
        axis = value.arg("dim", -1) % len(index)
        half = constant(sizes_of(value)[axis])
        upper = (*index[:axis], add(index[axis], half), *index[axis + 1 :])
        return f"({self._text(value.input, index)} * sigmoid({self._text(value.input, upper)}))"

    def _binary(self, value: Value, index: tuple[Index, ...]) -> str | None:
        other = value.arg("exponent") if value.op == "pow" else value.arg("other")
        if value.arg("alpha", 1) != 1 or value.arg("rounding_mode") is not None:
            return None
        return f"({self._operand(value.input, index)} {BINARY[value.op]} {self._operand(other, index)})"

    def _operand(self, operand: Any, index: tuple[Index, ...]) -> str:
        if isinstance(operand, Value) and operand.is_tensor:
            return self._text(operand, broadcast(index, operand))
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return repr(operand)
        raise Decline(
            "the activation has an operand that is no number", operand if isinstance(operand, Value) else None
        )

    # ------------------------------------------------------------------------------- projections

    def _projections(self, down: Projection) -> tuple[Projection, Projection | None, str, dict[str, str]]:
        """(up, gate, layout, names of the text's placeholders)."""
        require(1 <= len(self.found) <= 2, f"an expert has {len(self.found)} first projections", down.product)
        read = [self._first_projection(leaf) for leaf in self.found]
        if len(read) == 2:
            plain = all(set(leaf.features) == {self.inner} for leaf in self.found)
            require(plain, "gate and up are packed and separate at once", down.product)
            names = {leaf.name(self.inner): name for leaf, name in zip(self.found, expr.GATED_NAMES, strict=True)}
            return read[1], read[0], "separate", names
        layout, names = self._layout(self.found[0])
        return read[0], None, layout, names

    def _first_projection(self, leaf: _Leaf) -> Projection:
        out = self.notation.variables.new(sizes_of(leaf.value)[leaf.at])
        bias = leaf.bias_at(out)
        index = (*leaf.index[: leaf.at], out, *leaf.index[leaf.at + 1 :])
        return read_projection(self.notation, self.products, leaf.value, index, out, bias)

    def _layout(self, leaf: _Leaf) -> tuple[str, dict[str, str]]:
        i, packed = self.inner, sizes_of(leaf.value)[leaf.at]
        halves = {
            "concatenated": (i, add(i, constant(self.width))),
            "interleaved": (scale(i, 2), add(scale(i, 2), constant(1))),
        }
        if set(leaf.features) == {i} and packed == self.width:
            return "none", {leaf.name(i): expr.PLAIN_NAME}
        for layout, features in halves.items():
            if set(leaf.features) <= set(features) and packed == 2 * self.width:
                return layout, dict(zip(map(leaf.name, features), expr.GATED_NAMES, strict=True))
        raise Decline("gate and up do not lie side by side or interleaved in the first projection", leaf.value)

    # ------------------------------------------------------------------------------- input

    def _source(self, projection: Projection, is_token: IsToken) -> tuple[Place, tuple[Place, ...], float]:
        """The token's row, and what it is multiplied with before the projection."""
        value, index = projection.rows
        inputs: list[Place] = []
        number = 1.0
        while True:
            place = None
            for place in self._places(value, index):
                if is_token(*place, projection.inner):
                    return self._shaped_as_output(place, projection, is_token), tuple(inputs), number
                if place[0].op in ("to", "type_as", "mul"):
                    break
            assert place is not None
            value, index = place
            if value.op in ("to", "type_as") and isinstance(value.input, Value):
                self._require_exact_cast(value, projection)
                value = value.input
            elif value.op == "mul":
                value, index, factor = self._unscaled(value, index, projection.inner)
                number *= factor if isinstance(factor, float) else 1.0
                inputs += [] if isinstance(factor, float) else [factor]
            else:
                raise Decline("the rows of the first projection are not the tokens of the block", value)

    def _shaped_as_output(self, place: Place, projection: Projection, is_token: IsToken) -> Place:
        """The tokens in the output's shape, if they are a view of such a tensor, else as they are."""
        for source, index in self.notation.places(*place):
            if sizes_of(source)[:-1] == self.leading and is_token(source, index, projection.inner):
                return source, index
        return place

    def _require_exact_cast(self, cast: Value, projection: Projection) -> None:
        """A cast on the way in is one to the dtype of the product, or loses nothing."""
        exact = cast.dtype in (projection.product.dtype, torch.float32, torch.float64)
        require(exact, "the rows are rounded on the way to the experts", cast)

    def _unscaled(self, value: Value, index: tuple[Index, ...], inner: Index) -> tuple[Value, tuple[Index, ...], Any]:
        left, right = value.input, value.arg("other")
        for rows, other in ((left, right), (right, left)):
            if isinstance(rows, Value) and isinstance(other, (int, float)):
                return rows, broadcast(index, rows), float(other)
        require(isinstance(left, Value) and isinstance(right, Value), "the rows are scaled by no tensor", value)
        places = [(v, broadcast(index, v)) for v in (left, right)]
        with_rows = [any(a == inner.atom for i in p[1] for a in atoms(i)) for p in places]
        require(with_rows[0] != with_rows[1], "the rows are multiplied feature by feature before the experts", value)
        rows, factor = places if with_rows[0] else places[::-1]
        return rows[0], rows[1], factor


_STOPS = frozenset(BINARY) | UNARY | {"clamp", "clamp_min", "clamp_max", "gelu", "glu", "neg"}


@dataclass
class _Leaf:
    """A projection that the activation reads; ``features`` are the indices at which it does."""

    value: Value
    index: tuple[Index, ...]
    at: int
    bias: tuple[Value, tuple[Index | None, ...]] | None
    number: int
    features: list[Index] = field(default_factory=list)

    def name(self, feature: Index) -> str:
        """Placeholder for the feature in the text."""
        if feature not in self.features:
            self.features.append(feature)
        return f"leaf_{self.number}_{self.features.index(feature)}_"

    def others(self) -> tuple[Index, ...]:
        """The index without the feature."""
        return _others(self.index, self.at)

    def bias_at(self, out: Index) -> Place | None:
        """The bias of feature ``out``."""
        if self.bias is None:
            return None
        value, index = self.bias
        return value, tuple(out if i is None else i for i in index)


def _others(index: tuple[Index, ...], at: int) -> tuple[Index, ...]:
    return (*index[:at], *index[at + 1 :])


def _same_source(a: Place, a_inner: Index, b: Place, b_inner: Index) -> bool:
    return a[0] is b[0] and a[1][:-1] == b[1][:-1] and a[1][-1] == a_inner and b[1][-1] == b_inner


def token_row(tokens: Index, count: Size, width: Size) -> IsToken:
    """A test whether an element is feature ``inner`` of token ``tokens``, in a tensor [T, H] or [B, L, H]."""

    def is_token(value: Value, index: tuple[Index, ...], inner: Index) -> bool:
        floating = value.dtype is not None and value.dtype.is_floating_point
        if not floating or len(index) < 2 or index[-1] != inner or sizes_of(value)[-1] != width:
            return False
        sizes = sizes_of(value)[:-1]
        return flatten(index[:-1], sizes) == tokens and math.prod(sizes) == count

    return is_token
