"""Samoyeds: a ``torch.compile`` backend that rewrites mixture-of-experts blocks into dual-side-sparse fused ops.

model = torch.compile(model, backend="samoyeds")        # nothing to import
print(samoyeds_compile.explain(model, **inputs))        # what was found, what it became, and why not
"""

import samoyeds_compile.ops  # noqa: F401 - registers the samoyeds:: operators
from samoyeds_compile import integrations
from samoyeds_compile.errors import (
    CheckpointError,
    DistributedError,
    IntegrationError,
    OperandError,
    OptionError,
    SamoyedsError,
    SparsityError,
)
from samoyeds_compile.integrations.decorator import moe_experts
from samoyeds_compile.options import Options
from samoyeds_compile.report.explain import explain
from samoyeds_compile.report.model import BlockReport, GraphReport, Report
from samoyeds_compile.sparsity import (
    PackedTensor,
    SparsityConfig,
    SparsityReport,
    densify_,
    load_sparse,
    load_sparse_,
    save_sparse,
    sparsify_,
)

__version__ = "0.1.0"
__all__ = [
    "BlockReport",
    "CheckpointError",
    "DistributedError",
    "GraphReport",
    "IntegrationError",
    "OperandError",
    "OptionError",
    "Options",
    "PackedTensor",
    "Report",
    "SamoyedsError",
    "SparsityConfig",
    "SparsityError",
    "SparsityReport",
    "densify_",
    "explain",
    "integrations",
    "load_sparse",
    "load_sparse_",
    "moe_experts",
    "save_sparse",
    "sparsify_",
]
