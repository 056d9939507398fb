"""Samoyeds: a ``torch.compile`` backend that rewrites mixture-of-experts blocks into dual-side-sparse fused ops.

model = torch.compile(model, backend="samoyeds")        # nothing to import
print(samoyeds_compile.explain(model, **inputs))        # what was found, what it became, and why not
"""

import samoyeds_compile.ops  # noqa: F401 - registers the samoyeds:: operators
from samoyeds_compile import integrations
from samoyeds_compile.errors import IntegrationError, OperandError, OptionError, SamoyedsError
from samoyeds_compile.integrations.decorator import moe_experts
from samoyeds_compile.options import Options
from samoyeds_compile.report.explain import explain
from samoyeds_compile.report.model import BlockReport, GraphReport, Report

__version__ = "0.1.0"
__all__ = [
    "BlockReport",
    "GraphReport",
    "IntegrationError",
    "OperandError",
    "OptionError",
    "Options",
    "Report",
    "SamoyedsError",
    "explain",
    "integrations",
    "moe_experts",
]
