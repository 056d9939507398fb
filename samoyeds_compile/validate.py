"""Translation validation: run a region and its replacement on small random inputs before trusting the rewrite.

The original subgraph is cut out of the user's graph and replayed at small sizes: every expert hit, one expert empty,
one token, tokens in a non-contiguous view, sentinel ids where the block knows them; forward, and backward where
gradients are needed. Nothing of the user's data is read, so the verdict depends on the structure alone, and one verdict
serves every region of the same structure.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from samoyeds_compile.graph.extract import extract
from samoyeds_compile.graph.values import Value, hint
from samoyeds_compile.lower.stages import lower_experts
from samoyeds_compile.match.region import Carried, MoERegion
from samoyeds_compile.rewrite import emit_region

logger = logging.getLogger(__name__)

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}
"""Largest deviation allowed, relative to the largest entry, by the least precise dtype involved."""

LARGEST_REPLAYED = 64
"""Widths above this are replayed at about 48 instead."""


@dataclass(frozen=True)
class Case:
    """One way to route tokens: ``ids(T, K, E, generator)`` with what makes it worth testing."""

    name: str
    tokens: int
    ids: Callable[[int, int, int, torch.Generator], Tensor]
    contiguous: bool = True


@dataclass(frozen=True)
class Verdict:
    """Outcome of one validation: None, or what was wrong."""

    problem: str | None
    deviation: float


class Validator:
    """Validates regions, each distinct structure once; make one for each graph that is compiled."""

    def __init__(self) -> None:
        self._verdicts: dict[str, Verdict] = {}

    def check(self, region: MoERegion) -> Verdict:
        """The verdict on one region."""
        needs_grad = torch.is_grad_enabled() and region.output.context.grad
        key = f"{structure_key(region)}|grad={needs_grad}"
        if key not in self._verdicts:
            self._verdicts[key] = _verdict(region, needs_grad)
        return self._verdicts[key]


def structure_key(region: MoERegion) -> str:
    """Text that two regions share if and only if they compute the same with the same shapes and dtypes."""
    number = {value.node: i for i, value in enumerate([*region.inputs, *region.members])}

    def show(node: fx.Node) -> str:
        return f"%{number.get(node, node.meta.get('example_value'))}"

    lines = [f"{v.dtype}{list(map(str, v.shape[1:]))}{getattr(v.example, 'device', v.example)}" for v in region.inputs]
    for value in region.members:
        args = fx.map_arg((value.node.args, value.node.kwargs), show)
        lines.append(f"{value.op} {value.node.target} {args} {value.dtype}")
    return "\n".join([*lines, str(region.output.context.autocast)])


def _verdict(region: MoERegion, needs_grad: bool) -> Verdict:
    try:
        return _validate(region, needs_grad)
    except Exception as error:  # whatever keeps the rewrite from being checked keeps it from being made
        logger.debug("validation of %s failed", region.output, exc_info=True)
        return Verdict(f"the rewrite raised {type(error).__name__}: {error}", float("inf"))


def _validate(region: MoERegion, needs_grad: bool) -> Verdict:
    """Replay at small sizes; if the original itself does not run there, at its own sizes."""
    for small in (True, False):
        sizes = _Sizes(region, small)
        try:
            return _compare_all(region, sizes, needs_grad)
        except _OriginalFailed as failure:
            logger.debug("the original region does not replay at %s: %s", sizes, failure)
            problem = f"the original block could not be replayed: {failure}"
    return Verdict(problem, float("inf"))


class _OriginalFailed(Exception):
    """The original subgraph raised at the sizes chosen, which says nothing of the rewrite."""


class _Sizes:
    """Numbers for the dimension symbols, and the mapping from the region's real sizes to them."""

    def __init__(self, region: MoERegion, small: bool) -> None:
        hidden, width = region.hidden_size, region.intermediate_size
        self.h = _shrunk(hidden) if small else hidden
        self.i = _shrunk(width) if small else width
        self.by_role = {hidden: self.h}, {2 * width: 2 * self.i, width: self.i}

    def __repr__(self) -> str:
        return f"H={self.h}, I={self.i}"

    def numbers(self, tokens: int, top_k: int) -> dict[str, int]:
        return {"T": tokens, "S": tokens * top_k, "H": self.h, "I": self.i, "2I": 2 * self.i}


def _shrunk(size: int) -> int:
    """A small size that is as divisible by 8 as the real one: alignment decides which kernels accept an operand."""
    return size if size <= LARGEST_REPLAYED else 48 + size % 8


def _compare_all(region: MoERegion, sizes: _Sizes, needs_grad: bool) -> Verdict:
    worst = 0.0
    for case in _cases(region):
        deviation = _compare(region, sizes, case, needs_grad)
        if not deviation <= _tolerance(region):
            return Verdict(f"the rewrite deviates by {deviation:.2g} with {case.name}", deviation)
        worst = max(worst, deviation)
    return Verdict(None, worst)


def _cases(region: MoERegion) -> list[Case]:
    every = -(-region.num_experts // region.top_k) + 3
    cases = [
        Case("every expert hit", every, _all_experts),
        Case("one expert empty", 5, _without_first),
        Case("one token", 1, _all_experts),
        Case("tokens in a non-contiguous view", 4, _all_experts, contiguous=False),
    ]
    return [*cases, Case("sentinel ids", 6, _with_sentinels)] if region.sentinels else cases


def _all_experts(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    start = torch.randint(experts, (1,), generator=generator)
    return (torch.arange(tokens * top_k) + start).remainder(experts).view(tokens, top_k)


def _without_first(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    return _all_experts(tokens, top_k, max(experts - 1, 1), generator) + (1 if experts > 1 else 0)


def _with_sentinels(tokens: int, top_k: int, experts: int, generator: torch.Generator) -> Tensor:
    ids = _all_experts(tokens, top_k, experts, generator)
    return torch.where(torch.rand(ids.shape, generator=generator) < 0.4, experts, ids)


def _compare(region: MoERegion, sizes: _Sizes, case: Case, needs_grad: bool) -> float:
    numbers = sizes.numbers(case.tokens, region.top_k)
    literals = [(lit.value, lit.path, numbers[lit.symbol]) for lit in region.literals]
    original = extract(region.members, region.inputs, region.output, literals)
    with _replaying(region):
        inputs = _random_inputs(region, sizes, case)
        try:
            expected = _results(original, inputs, needs_grad)
        except Exception as error:
            raise _OriginalFailed(f"{type(error).__name__}: {error}") from error
        with torch.set_grad_enabled(needs_grad):
            replacement = _replacement(region, inputs)
        actual = _results(replacement, inputs, needs_grad)
    return max(_deviation(a, e) for a, e in zip(actual, expected, strict=True))


def _replacement(region: MoERegion, inputs: list[Any]) -> fx.GraphModule:
    """The replacement as a module, lowered as it will be in the user's graph."""
    graph = fx.Graph()
    placeholders = {value: graph.placeholder(f"input_{i}") for i, value in enumerate(region.inputs)}
    for node, tensor in zip(placeholders.values(), inputs, strict=True):
        node.meta["example_value"] = tensor
    graph.output(emit_region(region, graph, placeholders.__getitem__))
    module = fx.GraphModule(torch.nn.Module(), graph)
    lower_experts(module)
    module.recompile()
    return module


@contextlib.contextmanager
def _replaying(region: MoERegion) -> Iterator[None]:
    """Real tensors, and the autocast state of the region; the caller's random state is not touched."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for args in region.output.context.autocast:
            stack.enter_context(torch.autocast(*args))
        yield


def _random_inputs(region: MoERegion, sizes: _Sizes, case: Case) -> list[Any]:
    generator = torch.Generator().manual_seed(len(case.name))
    device = region.x.example.device

    def tensor(value: Value) -> Any:
        if not value.is_tensor:
            return hint(value.example)  # a number that Dynamo keeps symbolic, such as a clamp's limit
        if value is region.expert_ids:
            ids = case.ids(case.tokens, region.top_k, region.num_experts, generator)
            return ids.to(device=device, dtype=value.dtype)
        shape = _replayed_shape(value, region, sizes, case.tokens)
        scale = shape[-1] ** -0.5 if len(shape) == 3 else 1.0
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32) * (3 * scale if len(shape) == 3 else 1.0)
        if value is region.expert_weights:
            drawn = drawn.sigmoid()
        if value is region.x and not case.contiguous:
            drawn = drawn.t().contiguous().t()
        return drawn.to(device).to(value.dtype or torch.float32)

    return [tensor(value) for value in region.inputs]


def _replayed_shape(value: Value, region: MoERegion, sizes: _Sizes, tokens: int) -> tuple[int, ...]:
    if value is region.x:
        return tokens, sizes.h
    if value is region.expert_weights:
        return tokens, region.top_k
    hidden, width = sizes.by_role
    if value in (region.up.weight, region.down.weight):
        return region.num_experts, *_weight_shape(value, region, sizes)
    if value is region.up.bias:
        return value.shape[0], width.get(value.shape[1], value.shape[1])
    if value is region.down.bias:
        return value.shape[0], sizes.h
    by_size = width if _reads(region.carried_activation, value) else hidden
    return tuple(by_size.get(size, size) for size in value.shape)


def _weight_shape(value: Value, region: MoERegion, sizes: _Sizes) -> tuple[int, int]:
    if value is region.down.weight:
        rows, columns = sizes.h, sizes.i
    else:
        packed = value.shape[2 if region.up.transposed else 1]
        rows, columns = sizes.i * (packed // region.intermediate_size), sizes.h
    return (columns, rows) if region.up.transposed else (rows, columns)


def _reads(carried: Carried | None, value: Value) -> bool:
    return carried is not None and value in carried.externals


def _results(module: fx.GraphModule, inputs: list[Any], needs_grad: bool) -> list[Tensor]:
    """The output, and the gradients of every floating input for a fixed cotangent."""
    leaves = [_leaf(t, needs_grad) if isinstance(t, Tensor) else t for t in inputs]
    out = module(*leaves)
    if not needs_grad:
        return [out]
    differentiable = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, differentiable, cotangent, allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, differentiable, strict=True))]


def _leaf(tensor: Tensor, needs_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(needs_grad and tensor.dtype.is_floating_point)


def _deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry; infinite where shape, dtype or finiteness differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    difference = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max().clamp(min=1e-6)
    value = float(difference / scale)
    return value if value == value else float("inf")


def _tolerance(region: MoERegion) -> float:
    dtypes = [v.dtype for v in [*region.inputs, region.output] if v.dtype in TOLERANCE]
    dtypes.append(region.up.compute_dtype)
    return max(TOLERANCE[d] for d in dtypes if d is not None)
