"""What a match produces: an `MoERegion`, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from samoyeds_compile.graph.values import Value, ValueGraph

if TYPE_CHECKING:
    from samoyeds_compile.options import Options


class Decline(Exception):
    """A rule's only way to say no: the first condition that failed and the value at which it failed."""

    def __init__(self, reason: str, at: Value | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


class Unlike(Decline):
    """A decline of something that does not even look like a block; it is not reported."""


def require(condition: object, reason: str, at: Value | None = None) -> None:
    """Raise `Decline` unless ``condition`` holds."""
    if not condition:
        raise Decline(reason, at)


@dataclass(frozen=True)
class Derived:
    """An operand that the graph does not hold as such: a call that the rewrite adds, of functional ops only.

    Attributes:
        target: a function of torch, called on ``args``, in which values and other derived operands may stand.
        args: positional arguments.
        kwargs: keyword arguments, as pairs, so that two equal operands compare equal.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


Operand = Value | Derived


def leaves(operand: Any) -> Iterator[Value]:
    """The values that an operand is computed from, itself if it is one."""
    if isinstance(operand, Value):
        yield operand
    elif isinstance(operand, Derived):
        yield from leaves((*operand.args, *(v for _, v in operand.kwargs)))
    elif isinstance(operand, (tuple, list)):
        for item in operand:
            yield from leaves(item)


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
        weights: one stack [E, out, in], or E matrices [out, in]; the last two swapped if ``transposed``.
        bias: [E, out] or None.
        result: its rows in the graph, [S, out], bias and masks included; of separate experts the first one's.
        compute_dtype: the dtype in which the matrix product runs.
    """

    weights: tuple[Value, ...]
    bias: Operand | None
    transposed: bool
    result: Value
    compute_dtype: torch.dtype

    @property
    def num_experts(self) -> int:
        """E."""
        shape = self.weights[0].shape
        return int(shape[0]) if len(shape) == 3 else len(self.weights)

    @property
    def in_features(self) -> int:
        """Width of the rows that come in."""
        return int(self.weights[0].shape[-2 if self.transposed else -1])

    @property
    def out_features(self) -> int:
        """Width of the rows that go out."""
        return int(self.weights[0].shape[-1 if self.transposed else -2])


@dataclass
class MoERegion:
    """One mixture-of-experts block: where it starts, what it computes, where it ends.

    Attributes:
        family: name of the rule that found it.
        graph: the view it was found in.
        x: tokens, [T, H]; or, without ``expert_ids``, rows already dispatched, [E, C, H] or, sorted, [R, H].
        expert_ids: [T, K], any integer dtype; None where every expert has rows of its own.
        expert_weights: [T, K], floating point; None if each contribution counts once.
        gate: the gate projection, where it is not packed with ``up``.
        up: the first projection, gate and up packed where the experts are gated and ``gate`` is None.
        down: the second projection.
        activation: elementwise expression (see `samoyeds_codegen.expr`), or None where it is ``carried``.
        gate_up_layout: ``concatenated``, ``interleaved``, ``separate`` or ``none`` (plain MLP experts).
        carried_activation: the activation as a subgraph, if it is no expression.
        carried_post: what stands between the second projection and the routing weights (a norm), if anything.
        sentinels: ids may be >= E (expert parallelism) and then contribute nothing.
        weighting: ``output``, or ``input`` where the routing weights scale the rows before the experts.
        base: what the sum over experts is added to, [T, H], if anything.
        output: [T, H], or x's leading sizes and H.
        expert_axis: which axis of x counts experts, if there are no ids; the others but the last are rows.
        offsets: where rows come sorted by expert: the end of each expert's run, [E].
        computed: values inside the region that operands read (which rows find a place); they stay.
        flags: masks of tokens and experts, true where a token may go to an expert, that come from outside.
        capacity: how many rows an expert takes before it drops the others, where that is known and a number.
        prologue: ``computed`` and every value inside the region that they are computed from, in graph order.
        members: every value that the rewrite makes superfluous.
        shapes: values outside the region that only lend their shape and dtype to members (``zeros_like``).
    """

    family: str
    graph: ValueGraph
    x: Operand
    expert_ids: Operand | None
    expert_weights: Operand | None
    top_k: int
    up: Linear
    down: Linear
    activation: str | None
    gate_up_layout: str
    output: Value
    gate: Linear | None = None
    carried_activation: Carried | None = None
    carried_post: Carried | None = None
    sentinels: bool = False
    weighting: str = "output"
    base: Value | None = None
    expert_axis: int = 0
    offsets: Value | None = None
    computed: tuple[Value, ...] = ()
    flags: tuple[Value, ...] = ()
    capacity: int | None = None
    prologue: list[Value] = field(default_factory=list)
    members: list[Value] = field(default_factory=list)
    shapes: list[Value] = field(default_factory=list)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.num_experts

    @property
    def batched(self) -> bool:
        """Whether every expert has as many rows, [E, C, H]."""
        return self.expert_ids is None and self.offsets is None

    @property
    def hidden_size(self) -> int:
        """H, the width of the tokens that the experts see."""
        return self.up.in_features

    @property
    def intermediate_size(self) -> int:
        """I, the width of an expert."""
        return self.down.in_features

    @property
    def weight_layout(self) -> str:
        """``out_in`` or ``in_out``, of each expert's matrices."""
        return "in_out" if self.up.transposed else "out_in"

    @property
    def projections(self) -> tuple[Linear, ...]:
        """Gate (if it is a projection of its own), up and down."""
        return tuple(p for p in (self.gate, self.up, self.down) if p is not None)

    @property
    def inputs(self) -> list[Value]:
        """The values that flow into the region from outside, each once."""
        carried = [e for c in (self.carried_activation, self.carried_post) if c for e in c.externals]
        weights = [p.weights for p in self.projections]
        biases = [p.bias for p in self.projections]
        routing = (self.expert_ids, self.expert_weights, self.offsets)
        operands = (self.x, *routing, *weights, *biases, self.base, *carried, *self.shapes)
        return [value for value in dict.fromkeys(leaves(operands)) if value not in self.computed]


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

    def configured(self, options: Options) -> Family:
        """The family with what the user's options say about it."""
        return self

    def __repr__(self) -> str:
        return self.name


def is_int_tensor(value: Any) -> bool:
    """Whether the value is a tensor of an integer dtype."""
    return isinstance(value, Value) and value.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
