"""An expert's projections: which weight, which bias, of which rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import (
    Index,
    Var,
    mentions,
    sizes_of,
    unbounded,
)
from samoyeds_compile.match.notation.notation import Notation
from samoyeds_compile.match.notation.products import Contraction, Products
from samoyeds_compile.match.notation.reindex import Place
from samoyeds_compile.match.region import Decline, require


@dataclass(frozen=True)
class Weight:
    """A matrix of an expert.

    Attributes:
        value: a stack [E, ...] or, where ``expert`` is None, a matrix of its own.
        expert: which one of the stack.
        transposed: stored [in, out].
    """

    value: Value
    expert: Index | None
    transposed: bool


@dataclass(frozen=True)
class Bias:
    """A bias: a row of [E, out], or a vector of its own where ``expert`` is None."""

    value: Value
    expert: Index | None


@dataclass(frozen=True)
class Projection:
    """A product with an expert's weight: which weight, which bias, and the product in the graph."""

    weight: Weight
    bias: Bias | None
    product: Value
    rows: Place
    inner: Index


def read_projection(
    notation: Notation, products: Products, value: Value, index: tuple[Index, ...], out: Index, bias: Place | None
) -> Projection:
    """The product at ``index`` as a projection to feature ``out``."""
    product = products.of(value, index)
    require(product is not None, "a product is of a form that is not known", value)
    assert product is not None
    require(len(product.operands) == 2 and len(product.bound) <= 1, "a product is no projection by one weight", value)
    inner = product.bound[0] if product.bound else Index()
    for rows, weight in (product.operands, product.operands[::-1]):
        found = _weight(notation, *weight, out, inner)
        if found is not None:
            row_index_ok = out not in rows[1] or not out.terms
            require(row_index_ok, "the rows of a projection depend on its output feature", value)
            return Projection(found, _bias_of(notation, product, bias, out, found), value, rows, inner)
    raise Decline("a product has no expert weight", value)


def _weight(notation: Notation, value: Value, index: tuple[Index, ...], out: Index, inner: Index) -> Weight | None:
    """The nearest matrix or stack, in that order of indices, that an element is one of; None if it is no parameter."""
    found: Weight | None = None
    last, place = value, index
    for last, place in notation.places(value, index):
        weight = _as_weight(last, place, out, inner)
        found = weight if weight is not None and (found is None or _is_better(last, found.value)) else found
    if found is None or not is_parameter(last):
        return None
    own = found.expert is None or not found.expert.terms or mentions(place, found.expert)
    return found if own else None  # one matrix expanded to a batch is no stack of experts


def _is_better(deeper: Value, nearer: Value) -> bool:
    """Whether to go on to the tensor that a view was made from: stacks are better than their parts."""
    return len(deeper.shape) >= len(nearer.shape)


def is_parameter(value: Value) -> bool:
    """Whether a value is an input of the graph, or a cast of one."""
    while value.op in ("to", "type_as") and isinstance(value.input, Value):
        value = value.input
    return value.node.op in ("placeholder", "get_attr")


def _as_weight(value: Value, index: tuple[Index, ...], out: Index, inner: Index) -> Weight | None:
    floating = value.dtype is not None and value.dtype.is_floating_point
    if not floating or not all(isinstance(s, int) for s in value.shape) or len(index) not in (2, 3):
        return None
    expert = index[0] if len(index) == 3 else None
    if expert is not None and not _all_experts(value, expert):
        return None
    for transposed, wanted in ((False, (out, inner)), (True, (inner, out))):
        if index[-2:] == wanted and _whole(wanted, sizes_of(value)[-2:]):
            return Weight(value, expert, transposed)
    return None


def _all_experts(stack: Value, expert: Index) -> bool:
    """Whether a variable that counts experts runs over all of a stack, and not over a part."""
    return not isinstance(expert.atom, Var) or expert.atom.size == sizes_of(stack)[0]


def _whole(index: tuple[Index, ...], sizes: tuple[Any, ...]) -> bool:
    """Whether variables run over whole axes."""
    return all((getattr(i.atom, "size", None) if i.terms else 1) == n for i, n in zip(index, sizes, strict=True))


def _bias_of(notation: Notation, product: Contraction, added: Place | None, out: Index, weight: Weight) -> Bias | None:
    biases = [b for b in (product.bias, added) if b is not None]
    require(len(biases) < 2, "a projection has two biases", product.value)
    return _bias(notation, *biases[0], out, weight) if biases else None


def _bias(notation: Notation, value: Value, index: tuple[Index, ...], out: Index, weight: Weight) -> Bias:
    own = () if weight.expert is None else (weight.expert, unbounded(weight.expert))  # an index is in range anyway
    for vector, place in notation.places(value, index):
        if len(place) == 2 and place[1] == out and place[0] in own and _all_experts(vector, place[0]):
            return Bias(vector, weight.expert)
        if len(place) == 1 and place[0] == out and weight.expert is None:
            return Bias(vector, None)
    raise Decline("what is added to a projection is no bias of the same expert", value)
