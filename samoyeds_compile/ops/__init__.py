"""The ``samoyeds::`` operators.

Canonical: `moe_experts`; `experts_batched` and `experts_sorted` for rows that are already dispatched; `router`. Stages:
`route`, `expert_up`, `expert_down` (`expert_project` and `combine`). Building blocks: `expert_linear`,
`token_products`, `packed`, `sparse_experts`, `dense_experts`, `gpu_experts` (`gpu_experts_backward`). Beside them, on
demand: `profile_range`, `count_slots`.
Importing this package registers them all. ``T`` tokens, ``K`` experts a token, ``S = T * K`` slots (a token at one of
its experts), ``E`` experts, ``C`` rows an expert, ``R`` rows of all, ``H`` hidden size, ``I`` expert width; a name such
as ``x_TH`` says the shape, and of a list of weights (see `operands`) what it is as a stack.
"""

from samoyeds_compile.ops import (
    convert_layout,
    count_slots,
    dense_experts,
    expert_down,
    expert_linear,
    expert_up,
    experts_batched,
    experts_dense,
    experts_gathered,
    experts_gpu,
    experts_packed,
    experts_sorted,
    gpu_experts,
    gpu_experts_backward,
    moe_experts,
    packed,
    profile_range,
    route,
    router,
    sparse_experts,
    token_products,
)

__all__ = [
    "convert_layout",
    "count_slots",
    "dense_experts",
    "expert_down",
    "expert_linear",
    "expert_up",
    "experts_batched",
    "experts_dense",
    "experts_gathered",
    "experts_gpu",
    "experts_packed",
    "experts_sorted",
    "gpu_experts",
    "gpu_experts_backward",
    "moe_experts",
    "packed",
    "profile_range",
    "route",
    "router",
    "sparse_experts",
    "token_products",
]
