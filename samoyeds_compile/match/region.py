"""What a match produces: an `MoERegion`, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from samoyeds_compile.graph.values import Value, ValueGraph


class Decline(Exception):
    """A rule's only way to say no: the first condition that failed and the value at which it failed."""

    def __init__(self, reason: str, at: Value | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


def require(condition: object, reason: str, at: Value | None = None) -> None:
    """Raise `Decline` unless ``condition`` holds."""
    if not condition:
        raise Decline(reason, at)


@dataclass(frozen=True)
class Literal:
    """A size written into the graph as a number: argument ``path`` of ``value`` stands for the dimension ``symbol``.

    Translation validation needs to know, because it replays the region at other sizes.
    """

    value: Value
    path: tuple[str | int, ...]
    symbol: str


@dataclass(frozen=True)
class Carried:
    """A row-wise subgraph that has no name here and travels unchanged, from ``source`` to ``result``.

    Attributes:
        source: the rows it starts from, [S, *].
        result: the rows it ends with, [S, *].
        values: its values in graph order, ``source`` excluded.
        externals: values from outside the region that it reads (a norm's weight, say), none of which has rows.
    """

    source: Value
    result: Value
    values: tuple[Value, ...]
    externals: tuple[Value, ...]


@dataclass(frozen=True)
class Linear:
    """One projection of all experts.

    Attributes:
        weight: [E, out, in], or [E, in, out] if ``transposed``.
        bias: [E, out] or None.
        result: its rows in the graph, [S, out], bias and masks included.
        compute_dtype: the dtype in which the matrix product runs.
    """

    weight: Value
    bias: Value | None
    transposed: bool
    result: Value
    compute_dtype: torch.dtype


@dataclass
class MoERegion:
    """One mixture-of-experts block: where it starts, what it computes, where it ends.

    Attributes:
        family: name of the rule that found it.
        graph: the view it was found in.
        x: tokens, [T, H].
        expert_ids: [T, K], any integer dtype.
        expert_weights: [T, K], floating point.
        up: the first projection, gate and up packed where the experts are gated.
        down: the second projection.
        activation: elementwise expression (see `samoyeds_codegen.expr`), or None where it is ``carried``.
        gate_up_layout: ``concatenated``, ``interleaved`` or ``none`` (plain MLP experts).
        carried_activation: the activation as a subgraph, if it is no expression.
        carried_post: what stands between the second projection and the routing weights (a norm), if anything.
        sentinels: ids may be >= E (expert parallelism) and then contribute nothing.
        output: [T, H].
        members: every value that the rewrite makes superfluous.
        literals: sizes written into the members as numbers.
    """

    family: str
    graph: ValueGraph
    x: Value
    expert_ids: Value
    expert_weights: Value
    up: Linear
    down: Linear
    activation: str | None
    gate_up_layout: str
    carried_activation: Carried | None
    carried_post: Carried | None
    sentinels: bool
    output: Value
    members: list[Value] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.up.weight.shape[0])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.expert_ids.shape[1])

    @property
    def hidden_size(self) -> int:
        """H, the width of the tokens that the experts see."""
        return int(self.x.shape[1])

    @property
    def intermediate_size(self) -> int:
        """I, the width of an expert."""
        return int(self.down.weight.shape[1 if self.down.transposed else 2])

    @property
    def weight_layout(self) -> str:
        """``out_in`` or ``in_out``, of each expert's matrices."""
        return "in_out" if self.up.transposed else "out_in"

    @property
    def inputs(self) -> list[Value]:
        """The values that flow into the region from outside, each once."""
        carried = [e for c in (self.carried_activation, self.carried_post) if c for e in c.externals]
        optional = [self.up.bias, self.down.bias]
        values = [self.x, self.expert_ids, self.expert_weights, self.up.weight, self.down.weight]
        return list(dict.fromkeys([*values, *(v for v in optional if v is not None), *carried]))


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like a MoE block to ``family`` and was not rewritten, with the first failed condition."""

    family: str
    graph: ValueGraph
    anchor: Value
    reason: str
    at: Value | None


@dataclass(frozen=True)
class Candidate:
    """A place where a family may match: ``anchor`` is the value to name it by, ``match`` does the work."""

    anchor: Value
    match: Callable[[], MoERegion]


class Family:
    """Base of the surface patterns. A family finds its candidates and turns each into a region or declines."""

    name: str = ""
    summary: str = ""

    def candidates(self, graph: ValueGraph) -> list[Candidate]:
        """Cheap scan for places worth a full match; must be linear in the graph."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.name


def is_int_tensor(value: Any) -> bool:
    """Whether the value is a tensor of an integer dtype."""
    return isinstance(value, Value) and value.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
