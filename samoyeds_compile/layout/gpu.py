"""The plan of a block on a GPU: by number of slots, whether rows are gathered while they are loaded, or before.

Costs of projections are those of `samoyeds_codegen.gpu.cost`, which also choose the kernel of each call; calls of about
as many slots share a kernel (`choose.regime`), and so a layout.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from samoyeds_codegen.gpu.candidate import Candidate
from samoyeds_codegen.gpu.choose import choose, regime
from samoyeds_codegen.gpu.cost import LAUNCH, Block, by_order_seconds, projection_seconds
from samoyeds_codegen.gpu.device import Device
from samoyeds_codegen.triton.spec import ExpertsSpec
from samoyeds_compile.layout.algebra import Place
from samoyeds_compile.layout.assign import Assignment, Problem, price, with_runners_up
from samoyeds_compile.layout.declare import ARGUMENTS, CUDA, PRODUCTS, TRITON, ExpertUp
from samoyeds_compile.layout.plan import LayoutPlan, regime_report
from samoyeds_compile.layout.regimes import INTO_UP, Regime
from samoyeds_compile.layout.region import Numbers, Sizes, experts_region
from samoyeds_compile.report.layouts import LayoutReport

MOST_SLOTS = 2**27
PICO = 1e12


@dataclass(frozen=True)
class GpuBlock:
    """What is planned.

    Attributes:
        spec: the block.
        sizes: T does not matter.
        device: where it runs.
        kinds: of kernels, as `choose` takes them; empty for PyTorch's grouped products. These have no cost model of
            their own, and are taken to be as fast as Triton kernels of dense weights.
    """

    spec: ExpertsSpec
    sizes: Sizes
    device: Device
    kinds: str


@dataclass(frozen=True)
class Calls:
    """Calls that share a kernel and a layout.

    Attributes:
        slots: the most that one has; the least is half of that, and one.
        kernel: what computes them, for people.
        target: the same for declarations.
        numbers: what costs are evaluated with.
        reads: layout in which the first projection reads rows.
        others: in which it could, too.
    """

    slots: int
    kernel: str
    target: str
    numbers: Numbers
    reads: Place
    others: frozenset[Place]

    def tokens(self, top_k: int) -> tuple[int, int]:
        """The least and the most."""
        return self.slots // 2 // top_k + 1, self.slots // top_k


def gpu_plan(name: str, block: GpuBlock, choice: str = "cheapest", index: int | None = None) -> LayoutPlan:
    """Choose the layouts of a block on a GPU.

    Args:
        name: of the block in the report.
        block: what is planned.
        choice: one of `samoyeds_compile.options.LAYOUTS`; ``token_major`` gathers in a pass of its own wherever
            kernels let it.
        index: of the block in the graph's report.
    """
    block = replace(block, sizes=block.sizes.at(1))  # so that all graphs of a block share one plan
    found, sizes = calls(block), block.sizes
    gathered = [call.slots for call in found if _gathers(call, choice)]
    fused = found[-1].reads is Place.TOKENS
    pattern = f"{block.spec.dtype} {block.spec.pattern or 'dense'}"
    report = LayoutReport(
        name, index, f"{pattern}, {block.kinds or 'grouped products'} on {block.device.name}", "data sheet", "", 0, "",
        int(fused), sizes.top_k * sizes.hidden * 2 * sizes.size * fused,
        [regime_report(regime) for regime in gpu_regimes(block)], gathered=_spans(gathered, found[0].slots),
    )  # fmt: skip
    return LayoutPlan(None, report, sum(gathered) if block.kinds else 0)


def _gathers(call: Calls, choice: str) -> bool:
    """Whether rows are copied to slots first."""
    if choice == "token_major":
        return Place.SLOTS in {call.reads, *call.others}
    place = next(iter(call.others), call.reads) if choice == "dearest" else call.reads
    return place is Place.SLOTS


@functools.lru_cache(maxsize=256)
def calls(block: GpuBlock) -> tuple[Calls, ...]:
    """Of all numbers of slots, from one token on."""
    first = regime(block.sizes.top_k)
    slots = itertools.takewhile(lambda n: n <= max(MOST_SLOTS, first), (first << bit for bit in itertools.count()))
    return tuple(_calls(block, count) for count in slots)


def _calls(block: GpuBlock, slots: int) -> Calls:
    """The cheaper of what the first projection may read; with it the rest of the region is given."""
    candidate = _candidate(block, slots)
    target = TRITON if candidate.tiles is not None else CUDA
    kernel = f"{candidate.kind} {candidate.slots}"
    if not block.kinds:
        target, kernel = PRODUCTS, PRODUCTS
    at = block.sizes.at(slots // block.sizes.top_k)
    region, numbers = experts_region(at, target), _numbers(block, at, candidate, slots)
    places = sorted({read for read, _ in ExpertUp.on(target)})
    costs = {place: price(region, _layouts(bool(at.bias), target, place).edges, numbers) for place in places}
    best = min(places, key=lambda place: costs[place])
    return Calls(slots, kernel, target, numbers, best, frozenset(places) - {best})


def _candidate(block: GpuBlock, slots: int) -> Candidate:
    sizes = block.sizes
    return choose(block.spec, Block(sizes.experts, sizes.hidden, sizes.width), slots, block.device,
                  block.kinds or "triton")  # fmt: skip


def _numbers(block: GpuBlock, at: Sizes, candidate: Candidate, slots: int) -> Numbers:
    """Values of `declare.ARGUMENTS`: no constants of a CPU, and projections as `samoyeds_codegen.gpu.cost` has them."""
    spec, device, of = block.spec, block.device, Block(at.experts, at.hidden, at.width)
    first, second = (projection_seconds(candidate, op, spec, of, slots, device) for op in ("up", "down"))
    following = by_order_seconds(candidate, spec, of, slots, device) - first
    move = PICO / device.bandwidth
    return (
        at.tokens, at.hidden, at.width, at.experts, at.top_k, 2 if at.gated else 1, at.size, at.size, move, move, 1,
        0, 0, 0, 0, 0, 0, *(PICO * seconds for seconds in (LAUNCH, first, second, following)),
    )  # fmt: skip


@functools.cache
def _layouts(bias: bool, target: str, reads: Place) -> Assignment:
    """Of a region whose first projection reads this: what is possible does not depend on sizes or on the device."""
    region = experts_region(Sizes(1, 1, 1, 1, 1, bias=bias), target)
    problem = Problem(region, (1,) * len(ARGUMENTS))
    for written in (True, False):
        problem.pin(INTO_UP, reads, written)
    return problem.solve()


@functools.lru_cache(maxsize=256)
def gpu_regimes(block: GpuBlock) -> tuple[Regime, ...]:
    """At most three: ``decode``, the first kernel and layout, ``prefill``, the last, and ``mid``, all in between."""
    runs = [list(run) for _, run in itertools.groupby(calls(block), lambda call: (call.kernel, call.reads))]
    parts: Sequence[Iterable[Sequence[Calls]]] = (runs[:1], runs[1:-1], runs[1:][-1:])
    spans = [list(itertools.chain(*part)) for part in parts]
    names = ("decode", "mid", "prefill")
    return tuple(_regime(block, name, span) for name, span in zip(names, spans, strict=True) if span)


def _regime(block: GpuBlock, name: str, span: Sequence[Calls]) -> Regime:
    top_k = block.sizes.top_k
    at = span[len(span) // 2] if name == "mid" else span[0]
    first, (_, tokens) = span[0].tokens(top_k)[0], at.tokens(top_k)
    last = None if span[-1].slots * 2 > MOST_SLOTS else span[-1].tokens(top_k)[1]
    region = experts_region(block.sizes.at(tokens), at.target)
    return Regime(name, first, last, with_runners_up(region, at.numbers), tokens, at.kernel)


def _spans(slots: Sequence[int], least: int) -> str:
    """Numbers of slots of calls, such as ``1-64, 257-``, or ``all``, out of the most that each range has."""
    starts = [n for n in slots if n // 2 not in slots or n == least]
    ends = [n for n in slots if n * 2 not in slots]
    pairs = ((1 if a == least else a // 2 + 1, b) for a, b in zip(starts, ends, strict=True))
    found = ", ".join(f"{a}-" if b * 2 > MOST_SLOTS else f"{a}-{b}" for a, b in pairs)
    return "all" if found == "1-" else found
