"""Run a router and its replacement on small random logits: the same ids exactly, the same weights and gradients.

As for the blocks (`samoyeds_compile.validate`), nothing of the user's data is read, and one verdict serves all routers
of the same structure.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from samoyeds_compile.graph.extract import Fragment, extract
from samoyeds_compile.graph.values import Value, hint
from samoyeds_compile.replay.surroundings import replaying
from samoyeds_compile.routers.region import RouterRegion, read_operands
from samoyeds_compile.routers.rewrite import emit_router

logger = logging.getLogger(__name__)

TOKENS = 9
"""How many tokens to replay, where the router does not have their number written into it."""
Original = Callable[..., Tensor]

KINDS = ("random", "tied", "equal", "extreme")


class RouterValidator:
    """Validates routers, each distinct structure once; make one for each graph that is compiled."""

    def __init__(self) -> None:
        self._problems: dict[str, str | None] = {}

    def check(self, router: RouterRegion) -> str | None:
        """What is wrong with the replacement, None if nothing is."""
        needs_grad = torch.is_grad_enabled() and router.topk.context.grad
        key = f"{_structure_key(router)}|grad={needs_grad}"
        if key not in self._problems:
            self._problems[key] = _problem(router, needs_grad)
        return self._problems[key]


def _structure_key(router: RouterRegion) -> str:
    number = {value.node: i for i, value in enumerate([*router.inputs, *router.members])}
    lines = [f"{v.dtype}{list(map(str, v.shape))}{v.example.device}" for v in router.inputs]
    for value in router.members:
        args = fx.map_arg((value.node.args, value.node.kwargs), lambda n: f"%{number.get(n, '')}")
        lines.append(f"{value.node.target} {args} {value.dtype}")
    return "\n".join([*lines, str(router.spec), str(router.topk.context)])


def _problem(router: RouterRegion, needs_grad: bool) -> str | None:
    tokens = hint(router.logits.shape[0])
    problem = None
    for count in dict.fromkeys((TOKENS, tokens)):
        try:
            original = _originals(router)
            return next(filter(None, (_compare(router, original, kind, count, needs_grad) for kind in KINDS)), None)
        except Exception as error:  # a reshape to a number of tokens written into the graph, say
            logger.debug("the router does not replay with %s tokens", count, exc_info=True)
            problem = f"it could not be replayed: {type(error).__name__}: {error}"
    return problem


def _originals(router: RouterRegion) -> tuple[Original, Original]:
    """The original, once for the weights and once for the ids; both take the inputs and the dtype witnesses."""
    inputs = [*router.inputs, *_witnesses(router)]
    fragments = [extract(router.members, inputs, output) for output in (router.weights, router.ids)]
    weights_of, ids_of = (partial(_run, fragment) for fragment in fragments)
    return weights_of, ids_of


def _run(fragment: Fragment, *inputs: Tensor) -> Tensor:
    return fragment.run(inputs, lambda size: size.number)  # type: ignore[no-any-return]


def _witnesses(router: RouterRegion) -> list[Value]:
    """Tensors of which the router reads only the dtype (``type_as``)."""
    known = {*router.members, *router.inputs}
    others = (o for member in router.members for o in member.operands if o not in read_operands(member))
    return [o for o in dict.fromkeys(others) if o not in known]


def _replacement(router: RouterRegion) -> fx.GraphModule:
    graph = fx.Graph()
    placeholders = {value: graph.placeholder(f"input_{i}") for i, value in enumerate(router.inputs)}
    graph.output(emit_router(router, graph, placeholders.__getitem__))
    return fx.GraphModule(torch.nn.Module(), graph)


def _compare(
    router: RouterRegion, original: tuple[Original, Original], kind: str, tokens: int, needs_grad: bool
) -> str | None:
    with replaying(router.topk.context):
        inputs = [_draw(value, kind, tokens if value is router.logits else None) for value in router.inputs]
        witnesses = [torch.empty(0, dtype=w.dtype, device=w.example.device) for w in _witnesses(router)]
        weights_of, ids_of = original
        expected = _results(weights_of(*inputs, *witnesses), inputs, needs_grad)
        expected_ids = ids_of(*inputs, *witnesses)
        weights, ids = _replacement(router)(*inputs)
        actual = _results(weights, inputs, needs_grad)
    if not torch.equal(ids, expected_ids):
        return f"other experts are chosen for {kind} logits"
    for mine, theirs in zip(actual, expected, strict=True):
        if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
            return f"the weights are {mine.dtype} {tuple(mine.shape)} instead of {theirs.dtype} {tuple(theirs.shape)}"
        if not torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6, equal_nan=True):
            return f"weights or gradients deviate for {kind} logits"
    return None


def _results(weights: Tensor, inputs: list[Tensor], needs_grad: bool) -> list[Tensor]:
    """The weights, and the gradients of every input for a fixed cotangent."""
    if not (needs_grad and weights.requires_grad):
        return [weights.detach()]
    cotangent = torch.linspace(-1, 1, weights.numel(), device=weights.device).view(weights.shape).to(weights.dtype)
    grads = torch.autograd.grad(weights, inputs, cotangent, allow_unused=True)
    return [weights.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True))]


def _draw(value: Value, kind: str, tokens: int | None) -> Tensor:
    """Logits of one kind, or a random bias."""
    generator = torch.Generator().manual_seed(len(kind))
    shape = [hint(size) for size in value.shape]
    if tokens is not None:
        shape[0] = tokens
    drawn: Any = torch.randn(shape, generator=generator)
    if kind == "tied":
        drawn = drawn.round()
    elif kind == "equal":
        drawn = torch.zeros(shape)
    elif kind == "extreme" and tokens is not None:
        drawn = drawn * 30
    return drawn.to(value.example.device, value.dtype).requires_grad_()  # type: ignore[no-any-return]
