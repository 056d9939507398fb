"""Matrix products in index notation: one element of the result is a sum of products of elements of the operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import Index, sizes_of
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.reindex import Place, broadcast
from samoyeds_compile.match.notation.segments import expert_of_row


@dataclass(frozen=True)
class Contraction:
    """``sum over bound of product of operands [+ bias]``.

    Attributes:
        value: the product in the graph.
        operands: the elements multiplied.
        bound: the variables summed over.
        bias: the element added to the sum, if the op adds one.
    """

    value: Value
    operands: tuple[Place, ...]
    bound: tuple[Index, ...]
    bias: Place | None = None


@dataclass(frozen=True)
class GroupedOp:
    """How an opaque grouped matrix product takes its operands.

    Attributes:
        roles: what each positional parameter of the op is: ``input`` [S, in], ``weight`` [E, in, out], ``weight_t``
            [E, out, in], ``offsets`` [E] (where each expert's rows end), ``sizes`` [E] (how many rows each has),
            ``transposed`` (a flag: the weight is [E, out, in]) or ``_`` (something that must be left at its default).
    """

    roles: tuple[str, ...]


GROUPED_OPS: Mapping[str, GroupedOp] = {
    "_grouped_mm": GroupedOp(("input", "weight", "offsets")),
    "transformers::grouped_mm_fallback": GroupedOp(("input", "weight", "offsets")),
}

Rule = Callable[[Value, tuple[Index, ...], Notation], "Contraction | None"]


class Products:
    """Recognises matrix products; ``grouped`` names the grouped ones beside those that are known anyway."""

    def __init__(self, notation: Notation, grouped: Mapping[str, GroupedOp] | None = None) -> None:
        self.notation = notation
        self.grouped = {**GROUPED_OPS, **(grouped or {})}

    def is_product(self, value: Value) -> bool:
        """Whether the value is computed by a matrix product."""
        return value.op in _RULES or value.op in self.grouped

    def of(self, value: Value, index: tuple[Index, ...]) -> Contraction | None:
        """The element as a contraction, None if the op is none or has a form that is not known."""
        if value.op in self.grouped:
            return self._grouped(value, index)
        rule = _RULES.get(value.op)
        return rule(value, index, self.notation) if rule is not None else None

    def _grouped(self, value: Value, index: tuple[Index, ...]) -> Contraction | None:
        found = self._operands_by_role(value)
        if found is None or not all(isinstance(found.get(r), Value) for r in ("input", "weight")):
            return None
        rows, weight = found["input"], found["weight"]
        ends = found.get("offsets", found.get("sizes"))
        if len(index) != 2 or not isinstance(ends, Value):
            return None
        experts = sizes_of(weight)[0]
        expert = expert_of_row(ends, "offsets" in found, index[0], experts, self.notation)
        if expert is None:
            return None
        inner = self.notation.variables.new(sizes_of(rows)[1])
        matrix = (index[1], inner) if found.get("transposed") else (inner, index[1])
        return Contraction(value, ((rows, (index[0], inner)), (weight, (expert, *matrix))), (inner,))

    def _operands_by_role(self, value: Value) -> dict[str, Any] | None:
        """Operands by role; None if a parameter without a role is used."""
        given = list(value.args.values())
        names = _parameter_names(value)
        found: dict[str, Any] = {}
        for name, argument in value.args.items():
            position = int(name) if name.isdigit() else names.index(name) if name in names else given.index(argument)
            roles = self.grouped[value.op].roles
            role = roles[position] if position < len(roles) else "_"
            if role == "_" and argument is not None:
                return None
            found[role] = argument
        if "weight_t" in found:
            found |= {"weight": found.pop("weight_t"), "transposed": True}
        return found


def _parameter_names(value: Value) -> list[str]:
    """Names of an operator's parameters, by position, as `Value.args` calls them."""
    target = value.node.target
    target = getattr(target, "default", target)
    schema = getattr(target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else list(value.args)
    return ["input", *names[1:]] if names else []


def _linear(value: Value, index: tuple[Index, ...], notation: Notation) -> Contraction | None:
    rows, weight, bias = value.input, value.arg("weight", value.arg("1")), value.arg("bias", value.arg("2"))
    if not isinstance(weight, Value) or len(weight.shape) != 2:
        return None
    inner = notation.variables.new(sizes_of(weight)[1])
    added = (bias, (index[-1],)) if isinstance(bias, Value) else None
    return Contraction(value, ((rows, (*index[:-1], inner)), (weight, (index[-1], inner))), (inner,), added)


def _matmul(value: Value, index: tuple[Index, ...], notation: Notation) -> Contraction | None:
    """``a @ b`` with batch axes that broadcast; vectors only on the right."""
    left, right = value.input, value.arg("mat2", value.arg("other", value.arg("1")))
    if not isinstance(right, Value) or len(left.shape) < 2 or not right.shape:
        return None
    return _multiplied(value, left, right, index, notation)


def _multiplied(
    value: Value, left: Value, right: Value, index: tuple[Index, ...], notation: Notation, bias: Place | None = None
) -> Contraction:
    inner = notation.variables.new(sizes_of(left)[-1])
    vector = len(right.shape) == 1
    batch, row = (index[:-1], index[-1]) if vector else (index[:-2], index[-2])
    left_index = (*_batch(batch, left, 2), row, inner)
    right_index = (inner,) if vector else (*_batch(batch, right, 2), inner, index[-1])
    return Contraction(value, ((left, left_index), (right, right_index)), (inner,), bias)


def _batch(batch: tuple[Index, ...], operand: Value, matrix_rank: int) -> tuple[Index, ...]:
    sizes = sizes_of(operand)[:-matrix_rank]
    own = batch[len(batch) - len(sizes) :]
    return tuple(Index() if n == 1 else i for i, n in zip(own, sizes, strict=True))


def _added_product(value: Value, index: tuple[Index, ...], notation: Notation) -> Contraction | None:
    """``baddbmm(c, a, b)`` and ``addmm(c, a, b)`` with both factors 1."""
    added = value.input
    left, right = (
        value.arg("batch1", value.arg("mat1", value.arg("1"))),
        value.arg("batch2", value.arg("mat2", value.arg("2"))),
    )
    plain = value.arg("alpha", 1) == 1 and value.arg("beta", 1) == 1
    if not plain or not all(isinstance(v, Value) for v in (added, left, right)):
        return None
    return _multiplied(value, left, right, index, notation, (added, broadcast(index, added)))


def _einsum(value: Value, index: tuple[Index, ...], notation: Notation) -> Contraction | None:
    operands = _einsum_operands(value)
    letters = parse_equation(value.input, [len(o.shape) for o in operands]) if operands else None
    if letters is None:
        return None
    inputs, output = letters
    known = dict(zip(output, index, strict=True))
    bound = []
    for word, operand in zip(inputs, operands, strict=True):
        for letter, size in zip(word, sizes_of(operand), strict=True):
            if letter not in known:
                known[letter] = notation.variables.new(size)
                bound.append(known[letter])
    places = tuple(
        (operand, tuple(Index() if n == 1 else known[c] for c, n in zip(word, sizes_of(operand), strict=True)))
        for word, operand in zip(inputs, operands, strict=True)
    )
    return Contraction(value, places, tuple(bound))


def _einsum_operands(value: Value) -> list[Value]:
    given = [a for name, a in value.args.items() if name != "input"]
    flat = list(given[0]) if len(given) == 1 and isinstance(given[0], tuple) else given
    return flat if isinstance(value.input, str) and all(isinstance(o, Value) for o in flat) else []


def parse_equation(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """Letters of each operand and of the result; an ellipsis becomes capital letters not used elsewhere.

    None for an equation with a letter twice in one operand (a diagonal), without arrow, or of another number of axes.
    """
    text = equation.replace(" ", "")
    if text.count("->") != 1:
        return None
    left, output = text.split("->")
    words = left.split(",")
    if len(words) != len(ranks):
        return None
    missing = [rank - len(w.replace("...", "")) for w, rank in zip(words, ranks, strict=True) if "..." in w]
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in text][: max(missing, default=0)]
    filled = []
    for word, rank in zip(words, ranks, strict=True):
        width = rank - len(word.replace("...", ""))
        filled.append(word.replace("...", "".join(spare[len(spare) - width :]) if width > 0 else ""))
    result = output.replace("...", "".join(spare))
    sound = all(len(w) == r and len(set(w)) == r for w, r in zip(filled, ranks, strict=True))
    return (filled, result) if sound and len(set(result)) == len(result) else None


_RULES: Mapping[str, Rule] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv"), _matmul),
    **dict.fromkeys(("baddbmm", "addmm"), _added_product),
    "einsum": _einsum,
}
