"""The plan of one block: what its kernel is told, and what the report says."""

from __future__ import annotations

from dataclasses import dataclass

from samoyeds_codegen.cpp.isa import usable_isas
from samoyeds_codegen.cpp.layouts import MOST, Layouts
from samoyeds_codegen.cpp.spec import DenseExpertsSpec, ExpertsSpec
from samoyeds_compile.layout.algebra import Place
from samoyeds_compile.layout.assign import Assignment, EdgeLayout, price, token_major
from samoyeds_compile.layout.machine import Constants, Machine, kind
from samoyeds_compile.layout.regimes import Regime, crossing, few, kernel_beats, per_expert, picoseconds, regimes
from samoyeds_compile.layout.region import Sizes, experts_region
from samoyeds_compile.report.layouts import EdgeReport, LayoutReport, RegimeReport

PLAN = "samoyeds_layout_plan"
"""Under which a node of a canonical op carries its plan."""


@dataclass(frozen=True)
class LayoutPlan:
    """How one block's rows lie.

    Attributes:
        layouts: for the specification of its kernel, if that is one for CPUs.
        report: the same for people.
        gathers: for kernels on GPUs, as `gpu_experts` takes it.
    """

    layouts: Layouts | None
    report: LayoutReport
    gathers: int = 0


def plan(
    block: str, spec: ExpertsSpec | DenseExpertsSpec, sizes: Sizes, machine: Machine, choice: str = "cheapest",
    index: int | None = None, recorded: int | None = None,
) -> LayoutPlan:  # fmt: skip
    """Choose the layouts of a block.

    Args:
        block: its name in the report.
        spec: its kernel; its own layouts do not matter.
        sizes: T is the number of tokens if it is known, else any.
        machine: the constants of costs.
        choice: one of `samoyeds_compile.options.LAYOUTS`.
        index: of the block in the graph's report.
        recorded: number of tokens for which the report says what the block is expected to take.
    """
    constants = machine.constants(kind(spec))
    by_columns = isinstance(spec, DenseExpertsSpec) and spec.by_columns
    most = kernel_beats(machine.library[spec.dtype], constants.kernel) if by_columns else None
    rows = sum(1 << n for n in few(sizes, constants))
    layouts = Layouts(rows, by_rows(regimes(sizes, constants)[-1].assignment), most)
    if choice == "token_major":
        layouts = Layouts(rows, "xh", most)
    elif choice == "dearest":
        layouts = Layouts(_dearest(sizes, machine, kind(spec)), "xh", most)
    found = LayoutReport(
        block, index, kind(spec), machine.origin, _ranges(layouts), crossing(sizes, constants), layouts.by_rows,
        *saved(sizes, machine, kind(spec)), [regime_report(regime) for regime in regimes(sizes, constants)],
        recorded, expected(sizes.at(recorded), constants) if recorded else None,
    )  # fmt: skip
    return LayoutPlan(layouts, found)


def expected(sizes: Sizes, constants: Constants) -> float:
    """Microseconds that a block is expected to take, in the layouts that are best for so many tokens."""
    at = max(sizes.tokens, 1)
    found = next(r for r in regimes(sizes, constants) if r.last is None or at <= r.last)
    return round(price(experts_region(sizes), found.assignment.edges, sizes.numbers(constants)) / 1e6, 3)


def sizes_of(spec: ExpertsSpec | DenseExpertsSpec, tokens: int, hidden: int, width: int, experts: int, top_k: int,
             bias: bool) -> Sizes:  # fmt: skip
    """Sizes with the elements that the kernel of a specification has on this machine."""
    size = 4 if spec.dtype == "float32" else 2
    isa = usable_isas(spec.dtype)[0]
    tile_size = 2 if (isa.unit if isinstance(spec, DenseExpertsSpec) else isa.many == "amx") else 4
    return Sizes(tokens, hidden, width, experts, top_k, spec.gated, bias, size, tile_size)


def by_rows(assignment: Assignment) -> str:
    """Edges of the kernel that are written token by token and read as tiles (`Layouts.by_rows`)."""
    into_up, into_down = "gather -> expert_up", "-> expert_down"
    found = {edge.edge.name: edge for edge in assignment.edges}
    down = next(edge for name, edge in found.items() if name.endswith(into_down))
    return "".join(letter for letter, edge in (("x", found[into_up]), ("h", down)) if _turned(edge))


def _turned(edge: EdgeLayout) -> bool:
    return edge.read is Place.TILES and edge.written is not Place.TILES


def saved(sizes: Sizes, machine: Machine, name: str) -> tuple[int, int]:
    """(conversions, bytes a token) that an order fixed to token-major takes more than the cheapest, at prefill."""
    constants = machine.constants(name)
    best = regimes(sizes, constants)[-1]
    at = sizes.at(best.tokens)
    fixed = token_major(experts_region(at), at.numbers(constants), best.assignment)
    more = [e for e, b in zip(fixed.edges, best.assignment.edges, strict=True) if _turned(e) and not _turned(b)]
    width = sum(sizes.width if edge.edge.wide else sizes.hidden for edge in more)
    return len(more), sizes.top_k * width * 2 * sizes.size


def _dearest(sizes: Sizes, machine: Machine, name: str) -> int:
    """`Layouts.few` that costs most at the mean number of tokens: tiles for all experts, or for none."""
    kernel = machine.kernels[name]
    tokens = max(round(per_expert(sizes, machine.constants(name))), 1)
    return 0 if picoseconds(kernel.tiles, tokens) > picoseconds(kernel.rows, tokens) else Layouts.up_to(MOST).few


def _ranges(layouts: Layouts) -> str:
    """``1-13, 17-25``; a last one without an end is ``17-``."""
    kept = [n for n in range(1, MOST + 1) if layouts.keeps_rows(n)]
    starts = [n for n in kept if n - 1 not in kept]
    ends = [n for n in kept if n + 1 not in kept]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{a}-" if b == MOST else f"{a}-{b}" if a < b else str(a) for a, b in pairs)


def regime_report(regime: Regime) -> RegimeReport:
    """The same for people."""
    edges = [_edge(edge) for edge in regime.assignment.edges]
    return RegimeReport(regime.name, regime.first, regime.last, regime.tokens, edges, regime.kernel)


def _edge(edge: EdgeLayout) -> EdgeReport:
    runner_up = "" if edge.runner_up is None else edge.runner_up.title
    read = edge.read.title if edge.converts else ""
    cost, margin = round(edge.picoseconds / 1e6, 3), round(edge.margin / 1e6, 3)
    return EdgeReport(edge.edge.name, edge.written.title, read, cost, runner_up, margin)
