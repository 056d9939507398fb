"""An activation expression as C++ over floats, calling the functions of ``templates/functions.h``."""

from __future__ import annotations

import ast
import math

from samoyeds_codegen import expr
from samoyeds_codegen.errors import UnsupportedSpecError

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_UNBOUNDED = ("None", "")


def to_cpp(text: str) -> str:
    """The expression in C++.

    Raises:
        ExpressionError: it cannot be parsed.
        UnsupportedSpecError: it rounds to a dtype that C++ has no name for here.
    """
    return _show(expr.parse(text))


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
    return f"{float(value)!r}f"


def _binary(node: ast.BinOp) -> str:
    left, right = _show(node.left), _show(node.right)
    if isinstance(node.op, ast.Pow):
        squared = isinstance(node.right, ast.Constant) and node.right.value == 2
        return f"square({left})" if squared else f"power({left}, {right})"
    return f"({left} {_OPERATORS[type(node.op)]} {right})"


def _call(name: str, arguments: list[ast.expr]) -> str:
    first, *rest = arguments
    if name == "clamp":
        return _clamp(_show(first), rest)
    if name == "gelu" and rest:
        return f"gelu_tanh({_show(first)})" if _text(rest[0]) == "tanh" else f"gelu({_show(first)})"
    if name == "to":
        return _to(_show(first), _text(rest[0]))
    return f"{name}({', '.join(map(_show, arguments))})"


def _clamp(inner: str, bounds: list[ast.expr]) -> str:
    """As torch does it: at least the lower bound, then at most the upper one; NaN stays."""
    for function, bound in zip(("at_least", "at_most"), bounds, strict=False):
        if ast.unparse(bound) not in _UNBOUNDED:
            inner = f"{function}({inner}, {_show(bound)})"
    return inner


def _to(inner: str, dtype: str) -> str:
    if dtype == "float32":
        return inner
    if dtype == "bfloat16":
        return f"to_bfloat16({inner})"
    raise UnsupportedSpecError(f"activations that round to {dtype} have no kernel")


def _text(node: ast.expr) -> str:
    value = ast.literal_eval(node)
    return str(value)
