"""Elementwise expressions: the one form in which an expert's activation travels.

An expression is a line of Python over the names ``gate`` and ``up`` (gated experts) or ``x`` (plain MLP experts),
numbers, ``+ - * / **`` and the functions of `FUNCTIONS`, for example ``silu(gate) * up``. It is a string wherever it
is stored (op schemas, reports, kernel specifications), so it can be printed, hashed, cached and compared; it is
parsed by Python's own `ast` and evaluated on tensors, FX proxies or fake tensors alike.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

GATED_NAMES = ("gate", "up")
PLAIN_NAME = "x"
IDENTITY = PLAIN_NAME
"""The expression of experts whose activation is not fused: it returns its only input."""


def _clamp(x: Any, low: float | None = None, high: float | None = None) -> Any:
    return torch.clamp(x, min=low, max=high)


def _gelu(x: Any, approximate: str = "none") -> Any:
    return F.gelu(x, approximate=approximate)


def _to(x: Any, dtype: str) -> Any:
    return x.to(getattr(torch, dtype))


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": torch.abs,
    "clamp": _clamp,
    "elu": F.elu,
    "erf": torch.erf,
    "exp": torch.exp,
    "gelu": _gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "log1p": torch.log1p,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mish": F.mish,
    "relu": torch.relu,
    "relu6": F.relu6,
    "rsqrt": torch.rsqrt,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
    "to": _to,
}
"""Functions an expression may call; arguments after the first are numbers, None or strings unless both are tensors."""

_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}

NAMED: Mapping[str, str] = {
    "silu(gate) * up": "swiglu",
    "gelu(gate) * up": "geglu",
    "gelu(gate, 'tanh') * up": "geglu_tanh",
    "relu(gate) * up": "reglu",
    "sigmoid(gate) * up": "glu",
    "silu(x)": "silu",
    "gelu(x)": "gelu",
    "gelu(x, 'tanh')": "gelu_tanh",
    "relu(x)": "relu",
    "square(relu(x))": "relu2",
    "relu(x) ** 2": "relu2",
    "x": "identity",
}
"""Common names, for reports only; the expression itself is what is computed."""


class ExpressionError(ValueError):
    """An activation expression that cannot be parsed, with the part that is at fault."""


def display_name(text: str) -> str:
    """The common name of an expression, or the expression itself when it has none."""
    return NAMED.get(text, text)


@functools.lru_cache(maxsize=256)
def parse(text: str) -> ast.expr:
    """Parse and check an expression.

    Raises:
        ExpressionError: the text is no expression over `FUNCTIONS`, numbers and the permitted names.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"activation {text!r} is not an expression: {error.msg}") from error
    _check(tree, text)
    return tree


def names(text: str) -> frozenset[str]:
    """The inputs that an expression reads, a subset of ``gate``, ``up`` and ``x``."""
    called = {id(n.func) for n in ast.walk(parse(text)) if isinstance(n, ast.Call)}
    return frozenset(n.id for n in ast.walk(parse(text)) if isinstance(n, ast.Name) and id(n) not in called)


def evaluate(text: str, inputs: Mapping[str, Any]) -> Any:
    """Evaluate an expression on ``inputs``, operation by operation, a repeated part only once.

    Args:
        text: the expression.
        inputs: a tensor (or FX proxy) for each of its `names`.
    """
    return _evaluate(parse(text), inputs, {})


def _check(tree: ast.expr, text: str) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS):
            raise ExpressionError(
                f"activation {text!r} calls {ast.unparse(node.func)}, which is not one of {', '.join(FUNCTIONS)}"
            )
        if isinstance(node, ast.Name) and node.id not in (*GATED_NAMES, PLAIN_NAME, *FUNCTIONS):
            raise ExpressionError(f"activation {text!r} reads {node.id!r}; it may read gate, up or x")
        if not isinstance(node, _ALLOWED):
            raise ExpressionError(f"activation {text!r} holds a {type(node).__name__}, which is not elementwise")


_ALLOWED = (ast.Call, ast.Name, ast.Constant, ast.BinOp, ast.UnaryOp, ast.USub, ast.Load, *_BINARY)


def _evaluate(node: ast.expr, inputs: Mapping[str, Any], seen: dict[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return inputs[node.id]
    key = ast.dump(node)
    if key not in seen:
        seen[key] = _apply(node, inputs, seen)
    return seen[key]


def _apply(node: ast.expr, inputs: Mapping[str, Any], seen: dict[str, Any]) -> Any:
    if isinstance(node, ast.UnaryOp):
        return -_evaluate(node.operand, inputs, seen)
    if isinstance(node, ast.BinOp):
        left, right = (_evaluate(side, inputs, seen) for side in (node.left, node.right))
        return _BINARY[type(node.op)](left, right)
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)  # `_check` lets nothing else through
    return FUNCTIONS[node.func.id](*(_evaluate(a, inputs, seen) for a in node.args))
