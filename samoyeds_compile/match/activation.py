"""From the values between two projections to an activation expression, or to a carried subgraph.

Elementwise chains become text (`samoyeds_codegen.expr`). What has no text (a norm, an activation with parameters of
its own) is carried as it is, provided that it treats every row alike and on its own: the rewrite may change the order
of rows, so anything that looks across them must decline.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from samoyeds_codegen import expr
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import Carried, require

UNARY = frozenset(
    "abs elu erf exp hardsigmoid hardswish leaky_relu log1p mish relu relu6 rsqrt selu sigmoid silu softplus "
    "softsign sqrt square tanh".split()
)
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}
_LAST_DIM = frozenset("mean sum amax var softmax log_softmax norm".split())
_ROW_NORMS = frozenset(("layer_norm", "rms_norm"))
_ELEMENTWISE = UNARY | BINARY.keys() | {
    "to", "type_as", "clamp", "clamp_min", "clamp_max", "gelu", "neg", "maximum", "minimum", "where", "gt", "lt", "ge",
    "le", "eq", "ne", "logical_and", "logical_or", "expm1", "log", "sign", "reciprocal", "expand_as", "xielu",
    "contiguous", "detach", "logsigmoid", "hardtanh", "sin", "cos", "floor", "ceil", "round", "lerp", "addcmul",
}  # fmt: skip
MAX_TEXT = 1000
"""Longer expressions (a formula that repeats its parts exponentially) are carried instead."""


class NoExpression(Exception):
    """The values have no text; no error, they may still be carried."""


def between(source: Value, result: Value) -> tuple[Value, ...]:
    """Values on the way from ``source`` to ``result``, in graph order, ``source`` excluded and ``result`` included.

    Raises:
        Decline: ``result`` does not depend on ``source``.
    """
    depends: dict[Value, bool] = {source: True}

    def visit(value: Value) -> bool:
        if value not in depends:
            depends[value] = False  # also what a value before `source` is: it cannot depend on it
            if value.position > source.position:
                depends[value] = any([visit(o) for o in value.operands])
        return depends[value]

    require(visit(result), "the rows do not come from the projection", result)
    return tuple(sorted((v for v, yes in depends.items() if yes and v is not source), key=lambda v: v.position))


class ActivationReader:
    """Reads one activation; `read` returns (expression, layout)."""

    def __init__(self, source: Value, result: Value, packed_width: int, width: int) -> None:
        self.source, self.result = source, result
        self.packed_width, self.width = packed_width, width
        self.layouts: set[str] = set()
        self.texts: dict[Value, str] = {}

    def read(self) -> tuple[str, str]:
        """The expression and where gate and up lie.

        Raises:
            NoExpression: the values have no text.
        """
        text = self._text(self.result)
        if len(self.layouts) != 1 or len(text) > MAX_TEXT:
            raise NoExpression
        layout = self.layouts.pop()
        if layout == "none" and self.packed_width != self.width:
            raise NoExpression
        try:
            text = ast.unparse(expr.parse(text))  # without needless parentheses
        except expr.ExpressionError as error:  # a number that has no literal, such as inf
            raise NoExpression from error
        return text, layout

    def _text(self, value: Value) -> str:
        if value not in self.texts:
            self.texts[value] = self._leaf(value) or self._operation(value)
            if len(self.texts[value]) > MAX_TEXT:
                raise NoExpression
        return self.texts[value]

    def _leaf(self, value: Value) -> str | None:
        if value is self.source:
            self.layouts.add("none")
            return expr.PLAIN_NAME
        return self._chunk_half(value) or self._slice_half(value)

    def _chunk_half(self, value: Value) -> str | None:
        """``chunk(2, dim=-1)[i]`` and ``split(I, dim=-1)[i]``."""
        if value.op != "item" or value.input.input is not self.source:
            return None
        pieces, half = value.input, value.arg("key")
        if pieces.arg("dim", 0) not in (-1, 1) or half not in (0, 1) or not self._is_half(value):
            raise NoExpression
        halves = pieces.op == "split" and pieces.arg("split_size") == self.width
        if not halves and (pieces.op != "chunk" or pieces.arg("chunks") != 2):
            raise NoExpression
        self.layouts.add("concatenated")
        return expr.GATED_NAMES[half]

    def _slice_half(self, value: Value) -> str | None:
        """``z[..., :I]``, ``z[..., I:]``, ``z[..., ::2]`` and ``z[..., 1::2]``."""
        if value.op != "slice" or value.input is not self.source or value.arg("key") is None:
            return None
        *leading, last = value.arg("key")
        if not isinstance(last, slice) or any(k is not Ellipsis and k != slice(None) for k in leading):
            raise NoExpression
        if not self._is_half(value) or len(leading) + (Ellipsis not in leading) < 1:
            raise NoExpression
        if len(leading) == 0 or (leading == [slice(None)] and len(value.shape) != 2):
            raise NoExpression  # the slice is not on the features
        return self._half_of(value, last, len(leading))

    def _half_of(self, value: Value, part: slice, axis: int) -> str:
        start = part.start or 0
        if part.step == 2 and start in (0, 1) and part.stop in (None, self.packed_width):
            self.layouts.add("interleaved")
            return expr.GATED_NAMES[start]
        if part.step not in (None, 1):
            raise NoExpression
        self.layouts.add("concatenated")
        if start == 0 and part.stop == self.width:
            return "gate"
        if start == self.width and part.stop in (None, self.packed_width):
            return "up"
        raise NoExpression

    def _is_half(self, value: Value) -> bool:
        return len(value.shape) == 2 and value.shape[-1] == self.width and self.packed_width == 2 * self.width

    def _operation(self, value: Value) -> str:
        if value.op in BINARY:
            return self._binary(value)
        if value.op in ("to", "type_as"):
            return f"to({self._text(value.input)}, {str(value.dtype).removeprefix('torch.')!r})"
        if value.op in ("clamp", "clamp_min", "clamp_max"):
            return self._clamp(value)
        if value.op == "dropout" and (value.arg("p") == 0 or value.arg("training") is False):
            return self._text(value.input)
        if value.op == "neg":
            return f"(-{self._text(value.input)})"
        if value.op == "gelu":
            approximate = value.arg("approximate", "none")
            return f"gelu({self._text(value.input)}{'' if approximate == 'none' else f', {approximate!r}'})"
        if value.op in UNARY and self._plain_unary(value):
            return f"{value.op}({self._text(value.input)})"
        raise NoExpression

    def _plain_unary(self, value: Value) -> bool:
        """No argument but the input (and ``inplace``), so that the defaults of the op apply."""
        return not set(value.args) - {"input", "inplace"} and isinstance(value.input, Value)

    def _binary(self, value: Value) -> str:
        other = value.arg("exponent") if value.op == "pow" else value.arg("other")
        if value.arg("alpha", 1) != 1 or value.arg("rounding_mode") is not None:
            raise NoExpression
        text = f"{self._operand(value.input)} {BINARY[value.op]} {self._operand(other)}"
        return text if value is self.result else f"({text})"

    def _operand(self, operand: Any) -> str:
        if isinstance(operand, Value):
            return self._text(operand)
        if isinstance(operand, (int, float)) and not isinstance(operand, bool):
            return repr(operand)
        raise NoExpression

    def _clamp(self, value: Value) -> str:
        low, high = value.arg("min"), value.arg("max")
        if any(isinstance(b, Value) for b in (low, high)):
            raise NoExpression
        return f"clamp({self._text(value.input)}, {low!r}, {high!r})"


def carry(source: Value, result: Value) -> Carried:
    """Take the values between ``source`` and ``result`` along as they are.

    Raises:
        Decline: one of them is not known to treat every row alike and on its own.
    """
    values = between(source, result)
    inside = {source, *values}
    for value in values:
        _require_row_wise(value, inside)
    externals = dict.fromkeys(o for v in values for o in v.operands if o not in inside)
    return Carried(source, result, values, tuple(externals))


def _require_row_wise(value: Value, inside: Iterable[Value]) -> None:
    require(len(value.shape) == 2 or value.op in ("chunk", "split"), f"{value.op} changes the rank of the rows", value)
    require(_is_row_wise(value), f"{value.op} is not known to treat every row on its own", value)
    for operand in value.operands:
        if operand in inside:
            continue
        has_rows = len(operand.shape) >= 2 and operand.shape[-2] != 1
        require(not has_rows, f"{value.op} reads rows from outside the block", value)


def _is_row_wise(value: Value) -> bool:
    if value.op in _ELEMENTWISE or value.op in ("chunk", "split", "item"):
        return value.op not in ("chunk", "split") or value.arg("dim", 0) in (-1, 1)
    if value.op == "slice" and value.arg("key") is not None:  # aten.slice has none
        *leading, last = value.arg("key")
        return bool(leading) and all(k is Ellipsis or k == slice(None) for k in leading) and isinstance(last, slice)
    if value.op in _LAST_DIM:
        return value.arg("dim") in (-1, 1, (-1,), (1,)) and value.arg("keepdim", "softmax" in value.op) is True
    if value.op in _ROW_NORMS:
        return len(value.arg("normalized_shape")) == 1
    return False


def read_activation(
    source: Value, result: Value, packed_width: int, width: int
) -> tuple[str | None, str, Carried | None]:
    """The activation between two projections.

    Args:
        source: rows of the first projection, [S, 2I] or [S, I].
        result: rows that enter the second projection, before its cast, [S, I].
        packed_width: 2I or I.
        width: I.

    Returns:
        (expression, gate_up_layout, carried subgraph); exactly one of the first and third is None.

    Raises:
        Decline: the activation can neither be written down nor carried.
    """
    reader = ActivationReader(source, result, packed_width, width)
    try:
        text, layout = reader.read()
        return text, layout, None
    except NoExpression:
        return None, "none", carry(source, result)
