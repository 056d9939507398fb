"""From matches to report entries."""

from __future__ import annotations

from samoyeds_codegen import expr
from samoyeds_compile.graph.source import module_path, parameter_name, source_line
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.experts import MATRIX_PRODUCTS
from samoyeds_compile.match.region import MoERegion, NearMiss, leaves
from samoyeds_compile.match.router import name_router
from samoyeds_compile.report.model import BlockReport
from samoyeds_compile.report.remedies import cut_by_ddp


def report_region(region: MoERegion) -> BlockReport:
    """The entry of a matched region, before anything is known about its rewrite."""
    product = region.up.result.node
    weights = [weight for projection in region.projections for weight in projection.weights]
    return BlockReport(
        module=module_path(v.node for v in region.members if v.op in MATRIX_PRODUCTS),
        source=source_line(product),
        family=region.family,
        rewritten=False,
        experts=region.num_experts,
        top_k=region.top_k,
        hidden_size=region.hidden_size,
        intermediate_size=region.intermediate_size,
        activation=expr.display_name(region.activation) if region.activation else "carried subgraph",
        gate_up_layout=region.gate_up_layout,
        weight_layout=region.weight_layout,
        router=_router(region),
        parameters=tuple(filter(None, map(parameter_name, weights))),
    )


def _router(region: MoERegion) -> str:
    """The router's name; none where every expert has rows of its own, or each contribution counts once."""
    expert_ids, weights = next(leaves(region.expert_ids), None), next(leaves(region.expert_weights), None)
    return "" if expert_ids is None else name_router(expert_ids, weights or expert_ids)


def report_miss(miss: NearMiss) -> BlockReport:
    """The entry of something that looked like a block and was left alone."""
    at = miss.at if isinstance(miss.at, Value) else miss.anchor
    return BlockReport(
        module=module_path([miss.anchor.node]),
        source=source_line(miss.anchor.node),
        family=miss.family,
        rewritten=False,
        reason=miss.reason + cut_by_ddp(),
        reason_source=source_line(at.node),
    )
