"""The cheapest labels of a graph, exactly, by one s-t minimum cut.

Each variable has a label 0, 1 or 2 and is two binary properties: ``label >= 1`` and ``label >= 2``. Either property
alone is a minimum cut. They interact in one way, ``label >= 2`` implies ``label >= 1``, which is an arc of infinite
capacity between the two nodes of a variable, so that both are one cut. That is exact if every table of two variables is
submodular in the order of labels, ``f(i, j) + f(i-1, j-1) <= f(i, j-1) + f(i-1, j)``, as then each pair of properties
costs an arc whose capacity is not negative. Tables are checked; one that is not submodular is refused, never
approximated. Costs are integers, so sums are exact too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import networkx as nx

from samoyeds_compile.errors import LayoutError

LABELS = range(3)
FORBIDDEN = 10**24
"""What a label or a pair that no op supports costs: more than all that is possible together."""

Node = tuple[int, int]
"""A property: (variable, label); or an end."""
SOURCE: Node = (-1, 0)
SINK: Node = (-1, 1)

Table = tuple[tuple[int, ...], ...]
"""Of two variables: the cost of each pair of labels."""


def table(supported: Mapping[tuple[int, int], int]) -> Table:
    """A table with these entries. Any other costs what the nearest of them costs, and `FORBIDDEN` for each step to it.

    Raises:
        LayoutError: it is not submodular, so no minimum cut finds the cheapest labels.
    """

    def entry(i: int, j: int) -> int:
        return min(FORBIDDEN * (abs(i - a) + abs(j - b)) + costs for (a, b), costs in supported.items())

    full = tuple(tuple(entry(i, j) for j in LABELS) for i in LABELS)
    bad = [(i, j) for i in LABELS[1:] for j in LABELS[1:] if mixed(full, i, j) > 0]
    if bad:
        raise LayoutError(f"costs {dict(supported)} are not submodular at labels {bad[0]}; declare a cheaper diagonal")
    return full


def mixed(full: Table, i: int, j: int) -> int:
    """The second difference at (i, j); submodular tables have none that is positive."""
    return full[i][j] - full[i - 1][j] - full[i][j - 1] + full[i - 1][j - 1]


def minimise(unary: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int, Table]]) -> tuple[list[int], int]:
    """The cheapest labels and their cost.

    Args:
        unary: the cost of each label, for each variable.
        pairs: (variable, variable, table), each table made by `table`.
    """
    arcs: dict[tuple[Node, Node], int] = defaultdict(int)
    weights = [[costs[label] - costs[label - 1] for label in LABELS[1:]] for costs in unary]
    for a, b, full in pairs:
        for label in LABELS[1:]:
            weights[a][label - 1] += full[label][0] - full[label - 1][0]
            weights[b][label - 1] += full[0][label] - full[0][label - 1]
        for i in LABELS[1:]:
            for j in LABELS[1:]:
                # x * y * mixed, mixed <= 0, is mixed * y, and -mixed where y holds and x does not.
                weights[b][j - 1] += mixed(full, i, j)
                arcs[(b, j), (a, i)] -= mixed(full, i, j)
    for variable, properties in enumerate(weights):
        for label, weight in enumerate(properties, 1):
            node = variable, label
            arcs[(node, SINK) if weight > 0 else (SOURCE, node)] += abs(weight)
    source = _cut(arcs, len(unary))
    labels = [sum((variable, label) in source for label in LABELS[1:]) for variable in range(len(unary))]
    return labels, cost(labels, unary, pairs)


def cost(labels: Sequence[int], unary: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int, Table]]) -> int:
    """What labels cost."""
    own = sum(costs[label] for costs, label in zip(unary, labels, strict=True))
    return own + sum(full[labels[a]][labels[b]] for a, b, full in pairs)


def _cut(arcs: Mapping[tuple[Node, Node], int], variables: int) -> set[Node]:
    """The nodes on the side of the source."""
    graph: nx.DiGraph[Node] = nx.DiGraph()
    graph.add_nodes_from((SOURCE, SINK))
    graph.add_edges_from((a, b, {"capacity": capacity}) for (a, b), capacity in arcs.items() if capacity)
    graph.add_edges_from(((v, 2), (v, 1)) for v in range(variables))  # without a capacity: infinite
    return nx.minimum_cut(graph, SOURCE, SINK)[1][0]  # type: ignore[no-any-return]
