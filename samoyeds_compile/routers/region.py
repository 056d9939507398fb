"""What a router match produces: the op's attributes, its operands, its two results, and what becomes superfluous."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import require


@dataclass(frozen=True)
class Spec:
    """The attributes of `samoyeds::router`, in the order of the op; see there for what each means."""

    scoring: str
    order: str
    top_k: int
    sorted: bool
    weights_from: str
    renormalise: str = "none"
    epsilon: float = 0.0
    scale: float | None = None
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    group_sorted: bool = True
    masked_score: float = 0.0
    score_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The attributes as arguments of the op."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclass(frozen=True)
class RouterRegion:
    """One router.

    Attributes:
        spec: what to compute.
        logits: [T, E].
        bias: [E] or [1, E], or None.
        topk: the top-k that picks the experts; the op takes its place.
        ids: [T, K], the indices of that top-k.
        weights: [T, K], the last value that the op accounts for; what follows it stays.
        members: every value that the op makes superfluous, in graph order.
    """

    spec: Spec
    logits: Value
    bias: Value | None
    topk: Value
    ids: Value
    weights: Value
    members: tuple[Value, ...]

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The values that the op reads."""
        return (self.logits,) if self.bias is None else (self.logits, self.bias)


def close_region(spec: Spec, logits: Value, bias: Value | None, ids: Value, weights: Value) -> RouterRegion:
    """The region between the operands and the two results.

    Raises:
        Decline: something outside reads or overwrites a value from inside, or a part runs in another context.
    """
    topk = ids.input
    floating = logits.dtype is not None and logits.dtype.is_floating_point and len(logits.shape) == 2
    require(floating, "the logits are not floating point numbers [T, E]", logits)
    inputs = {logits} if bias is None else {logits, bias}
    members = _between(inputs, ids, weights)
    members |= {u for m in members for u in m.users if u.op == "item" and not u.users}  # in bodies of checkpoints
    for member in members:
        require(not member.writes_input, "the router writes to one of its inputs", member)
        require(member.context == topk.context, "grad mode or autocast changes inside the router", member)
        if member not in (ids, weights):
            inside = members.issuperset(member.users)
            require(inside, "scores or masks of the router are read outside of it and would be computed twice", member)
    for result in (ids, weights):
        untouched = result.superseded is None and all(u.op != "aliased_write" for u in result.users)
        require(untouched, "the ids or weights are overwritten later", result)
        require(any(m.node is result.holder for m in members), "the weights are written into another tensor", result)
    for value in inputs:
        alive = value.superseded is None or value.superseded > topk.position
        require(alive, "an input of the router is overwritten before the experts are chosen", value)
    return RouterRegion(spec, logits, bias, topk, ids, weights, tuple(sorted(members, key=lambda v: v.position)))


def _between(inputs: set[Value], *outputs: Value) -> set[Value]:
    members: set[Value] = set()
    stack = list(outputs)
    while stack:
        value = stack.pop()
        if value in inputs or value in members:
            continue
        require(
            value.op not in ("placeholder", "get_attr"), "the router reads an operand that has no role in it", value
        )
        require(value.op != "aliased_write", "the router reads a tensor that shares storage with one written to", value)
        members.add(value)
        stack.extend(o for o in read_operands(value) if o.is_tensor)
    return members


def read_operands(value: Value) -> list[Value]:
    """The operands whose numbers matter: of ``type_as`` only the first."""
    return [value.input] if value.op == "type_as" else value.operands
