"""From matches to report entries."""

from __future__ import annotations

from samoyeds_codegen import expr
from samoyeds_compile.graph.source import module_path, parameter_name, source_line
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.region import MoERegion, NearMiss
from samoyeds_compile.match.router import name_router
from samoyeds_compile.report.model import BlockReport


def report_region(region: MoERegion) -> BlockReport:
    """The entry of a matched region, before anything is known about its rewrite."""
    product = region.up.result.node
    weights = [weight for projection in region.projections for weight in projection.weights]
    return BlockReport(
        module=module_path([product]),
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
        router=name_router(region.expert_ids, region.expert_weights),
        parameters=tuple(filter(None, map(parameter_name, weights))),
    )


def report_miss(miss: NearMiss) -> BlockReport:
    """The entry of something that looked like a block and was left alone."""
    at = miss.at if isinstance(miss.at, Value) else miss.anchor
    return BlockReport(
        module=module_path([miss.anchor.node]),
        source=source_line(miss.anchor.node),
        family=miss.family,
        rewritten=False,
        reason=miss.reason,
        reason_source=source_line(at.node),
    )
