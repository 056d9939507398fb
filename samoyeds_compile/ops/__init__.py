"""The ``samoyeds::`` operators.

Canonical: `moe_experts`, `router`. Stages: `route`, `expert_up`, `expert_down`. Building block: `expert_linear`.
Importing this package registers them all. ``T`` tokens, ``K`` experts a token, ``S = T * K`` slots (a token at one of
its experts), ``E`` experts, ``H`` hidden size, ``I`` expert width; a name such as ``x_TH`` says the shape.
"""

from samoyeds_compile.ops import expert_down, expert_linear, expert_up, experts_gathered, moe_experts, route, router

__all__ = ["expert_down", "expert_linear", "expert_up", "experts_gathered", "moe_experts", "route", "router"]
