"""An activation expression as Triton over float32, calling the functions of ``templates/functions``."""

from __future__ import annotations

import ast
import math

from samoyeds_codegen import expr
from samoyeds_codegen.errors import UnsupportedSpecError

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_ROUNDED = ("bfloat16", "float16")
_MOST = 8
"""Largest exponent that is spelt out as a product."""


def to_triton(text: str) -> str:
    """The expression in Triton.

    Raises:
        ExpressionError: it cannot be parsed.
        UnsupportedSpecError: it has a power or a dtype that kernels lack.
    """
    return _show(expr.parse(text))


def called(text: str) -> frozenset[str]:
    """The functions that the text of `to_triton` calls by name, of those that must be defined in the kernel's file."""
    nodes = ast.walk(ast.parse(text))
    return frozenset(n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name))


def _show(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return _number(node.value)
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.UnaryOp):
        return f"(-{_show(node.operand)})"
    if isinstance(node, ast.BinOp):
        return _binary(node)
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)  # `parse` lets nothing else through
    return _call(node.func.id, node.args)


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UnsupportedSpecError(f"{value!r} in an activation has no meaning as a float")
    return repr(float(value))


def _binary(node: ast.BinOp) -> str:
    left = _show(node.left)
    if isinstance(node.op, ast.Pow):
        return _power(left, node.right)
    return f"({left} {_OPERATORS[type(node.op)]} {_show(node.right)})"


def _power(base: str, exponent: ast.expr) -> str:
    """A product: Triton has no power of its own, and that of CUDA's library is not in the interpreter."""
    number = exponent.value if isinstance(exponent, ast.Constant) else None
    if isinstance(number, (int, float)) and number in range(1, _MOST + 1):
        return f"power({base}, {int(number)})"
    raise UnsupportedSpecError(f"the power {ast.unparse(exponent)} has no kernel; 1 to {_MOST} have")


def _call(name: str, arguments: list[ast.expr]) -> str:
    first, *rest = arguments
    if name == "clamp":
        return _clamp(_show(first), rest)
    if name == "gelu" and rest:
        return f"gelu_tanh({_show(first)})" if ast.literal_eval(rest[0]) == "tanh" else f"gelu({_show(first)})"
    if name == "to":
        return _to(_show(first), str(ast.literal_eval(rest[0])))
    return f"{name}({', '.join(map(_show, arguments))})"


def _clamp(inner: str, bounds: list[ast.expr]) -> str:
    """As torch does it: at least the lower bound, then at most the upper one; NaN stays."""
    for function, bound in zip(("at_least", "at_most"), bounds, strict=False):
        if not (isinstance(bound, ast.Constant) and bound.value is None):
            inner = f"{function}({inner}, {_show(bound)})"
    return inner


def _to(inner: str, dtype: str) -> str:
    """A rounding step of the model: there and back, as everything else is float32."""
    if dtype == "float32":
        return inner
    if dtype in _ROUNDED:
        return f"({inner}).to(tl.{dtype}).to(tl.float32)"
    raise UnsupportedSpecError(f"activations that round to {dtype} have no kernel")
