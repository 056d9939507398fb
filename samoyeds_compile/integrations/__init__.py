"""Plugs into other libraries, and help for models whose experts no graph can hold.

`samoyeds_compile.integrations.transformers` and `samoyeds_compile.moe_experts` are for Python loops over the experts
that were hit, in models of the transformers library and in hand-written ones; `accelerate` lets that library, and the
Trainer of transformers, take the backend by name; `distributed` checks that ranks compiled the same. Nothing in here
imports those libraries before it is asked to: families are recognised by the names of their classes.
"""

from samoyeds_compile.integrations import accelerate, distributed, transformers

__all__ = ["accelerate", "distributed", "transformers"]
