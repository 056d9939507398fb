"""The minimum cut finds what trying everything finds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samoyeds_compile.errors import LayoutError
from samoyeds_compile.layout.cut import FORBIDDEN, Table, cost, minimise, table

COSTS = st.integers(0, 40)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Submodular: a sum of a cost of each label and of steps between labels."""
    rows, columns = draw(st.tuples(*[COSTS] * 3)), draw(st.tuples(*[COSTS] * 3))
    steps = {(i, j): draw(COSTS) for i in (1, 2) for j in (1, 2)}
    together = [[sum(s for (a, b), s in steps.items() if (i >= a) != (j >= b)) for j in range(3)] for i in range(3)]
    return table({(i, j): rows[i] + columns[j] + together[i][j] for i in range(3) for j in range(3)})


@st.composite
def graphs(draw: st.DrawFn, most: int = 8) -> tuple[list, list]:
    """Connected, with up to ``most`` edges, cycles and parallel ones among them; some labels are forbidden."""
    edges = draw(st.integers(1, most))
    size = draw(st.integers(2, edges + 1))
    unary = [list(draw(st.tuples(*[COSTS] * 3))) for _ in range(size)]
    for costs in unary:
        if draw(st.booleans()):
            costs[draw(st.integers(0, 2))] = FORBIDDEN
    pairs = []
    for edge in range(edges):
        a = draw(st.integers(0, min(edge, size - 1)))
        b = edge + 1 if edge + 1 < size else draw(st.integers(0, size - 1).filter(lambda b, a=a: b != a))
        pairs.append((a, b, draw(tables())))
    return unary, pairs


def brute_force(unary: list, pairs: list) -> int:
    """The least cost over all labels, by broadcasting; exact, as forbidden labels are beyond what floats confuse."""
    total = np.zeros((3,) * len(unary))
    for variable, costs in enumerate(unary):
        total = total + _along(np.array(costs, dtype=float), (variable,), len(unary))
    for a, b, full in pairs:
        both = np.array(full, dtype=float)
        total = total + _along(both if a < b else both.T, (min(a, b), max(a, b)), len(unary))
    return int(total.min())


def _along(values: np.ndarray, axes: tuple[int, ...], rank: int) -> np.ndarray:
    return values.reshape([3 if axis in axes else 1 for axis in range(rank)])


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_as_cheap_as_brute_force(graph: tuple[list, list]) -> None:
    labels, least = minimise(*graph)
    assert least == cost(labels, *graph) == brute_force(*graph)


@settings(max_examples=8, deadline=None)
@given(graphs(most=12))
def test_as_cheap_as_brute_force_on_the_largest(graph: tuple[list, list]) -> None:
    assert minimise(*graph)[1] == brute_force(*graph)


def test_properties_interact() -> None:
    """Cut one after the other they would go wrong: slots alone cost, and feature-major alone is not to be had."""
    unary = [[5, 9, 0]]
    assert minimise(unary, []) == ([2], 0)
    assert minimise([[5, 9, 6]], []) == ([0], 5)


def test_tables_that_no_cut_solves_are_refused() -> None:
    with pytest.raises(LayoutError, match="not submodular"):
        table({(0, 0): 5, (1, 1): 5, (0, 1): 0, (1, 0): 0})


def test_unsupported_pairs_are_never_taken() -> None:
    only = table({(0, 1): 7, (2, 2): 3})
    for a, b in itertools.product(range(3), repeat=2):
        pinned = [[0 if label == wanted else FORBIDDEN for label in range(3)] for wanted in (a, b)]
        assert (minimise(pinned, [(0, 1, only)])[1] < FORBIDDEN) == ((a, b) in {(0, 1), (2, 2)})
