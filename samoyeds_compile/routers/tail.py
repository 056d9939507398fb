"""What follows the first routing weights: renormalisation, a factor, a cast, in this order, each optional.

Only what is recognised is taken into the op. Everything behind it (a scale for each expert, say) stays as it is.
"""

from __future__ import annotations

from typing import Any

from samoyeds_compile.graph.values import Value
from samoyeds_compile.routers.parts import LAST, has_only, is_number


def read_tail(weights: Value) -> tuple[Value, dict[str, Any]]:
    """The last value that the op can account for, starting from ``weights``, and its part of the `Spec`."""
    fields: dict[str, Any] = {}
    for step in (_renormalised, _scaled, _cast):
        found = step(_past_idle_casts(weights))
        if found is not None:
            weights, more = found
            fields |= more
    return _past_idle_casts(weights), fields


def _past_idle_casts(value: Value) -> Value:
    """The value behind casts to the dtype that it has already."""
    while (cast := _cast_of(value)) is not None and cast.dtype == value.dtype:
        value = cast
    return value


def _cast_of(value: Value) -> Value | None:
    if len(value.users) != 1 or value.users[0].op not in ("to", "type_as"):
        return None
    cast = value.users[0]
    return cast if cast.input is value and cast.example.device == value.example.device else None


def _renormalised(weights: Value) -> tuple[Value, dict[str, Any]] | None:
    quotient = next((u for u in weights.users if u.op == "div" and u.input is weights), None)
    divisor = quotient.arg("other") if quotient is not None and has_only(quotient, "input", "other") else None
    if quotient is None or not isinstance(divisor, Value) or divisor.users != [quotient]:
        return None
    total, fields = _read_divisor(divisor)
    if not _is_total(total, weights) or not weights.dtype == divisor.dtype == quotient.dtype:
        return None
    private = set(weights.users) == {quotient, total} and (total is divisor or total.users == [divisor])
    return (quotient, fields) if private else None


def _read_divisor(divisor: Value) -> tuple[Any, dict[str, Any]]:
    """The sum in ``sum``, ``sum + epsilon`` or ``sum.clamp(min=epsilon)``, and its part of the `Spec`."""
    if divisor.op == "add" and has_only(divisor, "input", "other"):
        operands = (divisor.input, divisor.arg("other"))
        total, epsilon = operands if is_number(operands[1]) else operands[::-1]
        if is_number(epsilon):
            return total, {"renormalise": "sum", "epsilon": float(epsilon)}
    if divisor.op in ("clamp", "clamp_min") and has_only(divisor, "input", "min") and is_number(divisor.arg("min")):
        return divisor.input, {"renormalise": "clamped_sum", "epsilon": float(divisor.arg("min"))}
    return divisor, {"renormalise": "sum"}


def _is_total(total: Any, weights: Value) -> bool:
    is_sum = isinstance(total, Value) and total.op == "sum" and total.input is weights
    return is_sum and has_only(total, "input", "dim", "keepdim") and total.arg("dim") in LAST and total.arg("keepdim")


def _scaled(weights: Value) -> tuple[Value, dict[str, Any]] | None:
    product = weights.users[0] if len(weights.users) == 1 else None
    if product is None or product.op != "mul" or not has_only(product, "input", "other"):
        return None
    operands = [product.input, product.arg("other")]
    factor = operands[1] if operands[0] is weights else operands[0]
    return (product, {"scale": float(factor)}) if is_number(factor) else None


def _cast(weights: Value) -> tuple[Value, dict[str, Any]] | None:
    cast = _cast_of(weights)
    return None if cast is None else (cast, {"out_dtype": cast.dtype})
