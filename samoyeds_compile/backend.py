"""The ``torch.compile`` entry and the pipeline, from Dynamo's graph to the base compiler."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from samoyeds_compile.options import Options

if TYPE_CHECKING:
    from samoyeds_compile.graph.values import ValueGraph
    from samoyeds_compile.lower.kernels import KernelChoice
    from samoyeds_compile.match.region import Family, MoERegion
    from samoyeds_compile.report.layouts import LayoutReport
    from samoyeds_compile.report.model import BlockReport, GraphReport

    Match = tuple[MoERegion, BlockReport]

logger = logging.getLogger(__name__)


def samoyeds(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph; ``torch.compile(model, backend="samoyeds")`` calls this.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs, parameters included.
        mode: an Inductor mode.
        options: keys of `Options`, and any option of Inductor.

    Raises:
        OptionError: an unknown option or mode.
    """
    from torch._dynamo.exc import RestartAnalysis

    from samoyeds_compile.base import compile_with_base
    from samoyeds_compile.capture import callers_settings

    chosen = Options.from_call(mode, options)
    with callers_settings() as can_retrace:
        report = optimize(gm, example_inputs, chosen)
        if can_retrace:
            _require_known_sizes(gm, report, chosen)
        if chosen.report is not None:
            chosen.report(report)
        try:
            return compile_with_base(gm, example_inputs, chosen)
        except Exception as error:
            if can_retrace and not isinstance(error, RestartAnalysis):
                _discarded(report, f"the base compiler failed: {type(error).__name__}: {error}")
            raise


_backend = samoyeds
del samoyeds


def __getattr__(name: str) -> Any:
    """``samoyeds``: whoever asks for the backend is about to compile, so Dynamo is loaded and gets its hook now."""
    if name != "samoyeds":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from samoyeds_compile.bisect import register
    from samoyeds_compile.capture import install

    install(_backend)
    register()
    return _backend


def _require_known_sizes(gm: fx.GraphModule, report: GraphReport, options: Options) -> None:
    """Have the frame traced again unless rewrites account for everything that only our settings let Dynamo capture."""
    from samoyeds_compile.capture import Retrace, unaccounted
    from samoyeds_compile.graph.source import source_line

    left = unaccounted(gm)
    if left:
        why = f"the graph needs values of {left[0].name!r} that are known only when it runs ({source_line(left[0])})"
        if report.blocks and options.report is not None:
            options.report(_discarded(report, why))
        raise Retrace(why)
    if report.break_reason and not any(b.rewritten for b in report.blocks):
        raise Retrace("nothing is gained, and with our settings Dynamo may break the graph for another reason")


def _discarded(report: GraphReport, why: str) -> GraphReport:
    from samoyeds_compile.report.advice import advise

    report.discarded, report.break_reason, report.break_source = why, "", ""
    for block in report.blocks:
        block.rewritten, block.became, block.routing = False, (), None
        block.reason = block.reason or why
    advise(report.blocks)
    return report


def optimize(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, families: Sequence[Family] | None = None
) -> GraphReport:
    """The pipeline: rewrite the MoE blocks of a graph in place and report on it.

    Whatever fails in here, the graph stays valid: at worst it is as it came.

    Args:
        gm: a Dynamo graph, nested graphs (checkpoint bodies, nested compile regions) included.
        example_inputs: its inputs; only the dump reads them, and only numbers.
        options: what to do and what to leave.
        families: the surface patterns to look for; all of them by default.
    """
    from samoyeds_compile.graph.values import read_graphs
    from samoyeds_compile.match.driver import FAMILIES
    from samoyeds_compile.report.trace import debug_dump, trace_report
    from samoyeds_compile.steps import Steps

    chosen = [f.configured(options) for f in (FAMILIES if families is None else families)]
    chosen = [f for f in chosen if f.name not in options.disable]
    steps = Steps(gm, example_inputs, debug_dump(options.dump))
    with steps.protecting():
        graphs = steps.run("normalize", read_graphs, gm)
        matches = steps.run("match", find_blocks, graphs, chosen, steps.report)
        steps.found(matches)
        sound = steps.run("validate", keep_sound, matches, options)
        if sound:
            steps.run("rewrite", rewrite_blocks, sound, edits=True)
            if options.fuse_routers or (options.fuse_routers is None and not torch.is_grad_enabled()):
                steps.run("routers", fuse_routers, sound, options, edits=True)
        if any(block.rewritten for block in steps.report.blocks):  # integrations write canonical ops themselves
            steps.report.layouts = steps.run("layouts", plan_layouts, gm, options)
            if options.record_routing:
                steps.run("routing", count_slots, gm, steps.report, edits=True)
            steps.kernels(steps.run("lower", lower_blocks, gm, options, edits=True))
            if options.profile_ranges:
                steps.run("ranges", mark_blocks, gm, steps.report, edits=True)
    trace_report(steps.report)
    _log(steps.report)
    return steps.report


def find_blocks(graphs: Sequence[ValueGraph], families: Sequence[Family], report: GraphReport) -> list[Match]:
    """Match all families; every block and every near-miss gets its entry in the report."""
    from samoyeds_compile.graph.edit import BLOCK
    from samoyeds_compile.match.driver import match_regions
    from samoyeds_compile.report.blocks import report_miss, report_region
    from samoyeds_compile.report.called import called_blocks

    regions, misses = match_regions(graphs, families)
    matches = [(region, report_region(region)) for region in regions]
    called = called_blocks(graphs)
    members = [
        *([v.node for v in r.members] for r in regions),
        *([n] for n, _ in called),
        *([m.anchor.node] for m in misses),
    ]
    for block, nodes in enumerate(members):
        for node in nodes:
            node.meta.setdefault(BLOCK, block)
    report.blocks += [*(b for _, b in matches), *(b for _, b in called), *map(report_miss, misses)]
    return matches


def keep_sound(matches: Sequence[Match], options: Options) -> list[Match]:
    """The matches to rewrite: all, or those whose rewrite was seen to compute the same."""
    from samoyeds_compile.validate import Validator

    if not options.rewrite:
        for _, block in matches:
            block.reason = "rewriting is switched off (rewrite=False)"
        return []
    validator = Validator() if options.validate else None
    return [match for match in matches if _is_allowed(match[1]) and (validator is None or _passes(validator, *match))]


def _is_allowed(block: BlockReport) -> bool:
    """Whether PyTorch's bisector, if it is at work, lets the block be rewritten."""
    from samoyeds_compile import bisect

    allowed = bisect.allows("samoyeds_rewrite", lambda: f"{block.module or 'block'} ({block.source})")
    if not allowed:
        block.reason = "rewriting is switched off by the compiler bisector"
    return allowed


def _passes(validator: Any, region: MoERegion, block: BlockReport) -> bool:
    verdict = validator.check(region)
    block.deviation = verdict.deviation
    if verdict.problem is not None:
        block.reason = f"validation refused the rewrite: {verdict.problem}"
        logger.warning("%s (%s): %s; the original is kept", block.module or "block", block.source, block.reason)
    return verdict.problem is None


def rewrite_blocks(matches: Sequence[Match]) -> None:
    """Write every match as canonical op (or, where a part has no name, as stage ops)."""
    from samoyeds_compile.rewrite import rewrite_region

    in_order = sorted(matches, key=lambda match: match[0].output.position)  # of blocks in a row the first one first
    for region, block in in_order:
        block.became = rewrite_region(region)
        block.rewritten = True


def fuse_routers(matches: Sequence[Match], options: Options) -> None:
    """Replace the routers of rewritten blocks by one op each, where they are recognised."""
    from samoyeds_compile import bisect
    from samoyeds_compile.routers import driver

    def is_allowed(match: Match) -> bool:
        return bisect.allows("samoyeds_routers", lambda: f"the router of {match[1].module}")

    allowed = [match for match in matches if is_allowed(match)]
    driver.fuse_routers(allowed, options.validate, everywhere=options.fuse_routers is True)


def plan_layouts(gm: fx.GraphModule, options: Options) -> list[LayoutReport]:
    """Choose the layouts of every block that a kernel or a GPU computes; the lowering reads them."""
    from samoyeds_compile.graph.values import graph_modules
    from samoyeds_compile.layout.propagate import propagate_layouts

    chosen = options.layouts, options.triton, options.mode.startswith("max-autotune")
    return [report for module in graph_modules(gm) for report in propagate_layouts(module, *chosen)]


def count_slots(gm: fx.GraphModule, report: GraphReport) -> None:
    """Count beside every rewritten block how many slots each expert gets."""
    from samoyeds_compile.lower.routing import add_counters

    add_counters(gm, report.blocks)


def lower_blocks(gm: fx.GraphModule, options: Options | None = None) -> list[KernelChoice]:
    """Lower every canonical op to its stages or a kernel; says how each block is computed."""
    from samoyeds_compile.graph.values import graph_modules
    from samoyeds_compile.lower.stages import lower_experts

    triton, measure = (options.triton, options.mode.startswith("max-autotune")) if options else (None, False)
    return [choice for module in graph_modules(gm) for choice in lower_experts(module, triton, measure)]


def mark_blocks(gm: fx.GraphModule, report: GraphReport) -> None:
    """Surround every rewritten block by a range of the profiler."""
    from samoyeds_compile.graph.values import graph_modules
    from samoyeds_compile.lower.ranges import add_ranges

    for module in graph_modules(gm):
        add_ranges(module, report.blocks)


def _log(report: GraphReport) -> None:
    done = sum(b.rewritten for b in report.blocks)
    logger.info("graph %s: %d of %d MoE blocks rewritten", report.name, done, len(report.blocks))
    for block in report.blocks:
        if not block.rewritten:
            logger.info("not rewritten: %s: %s (%s)", block.module, block.reason, block.reason_source or block.source)
