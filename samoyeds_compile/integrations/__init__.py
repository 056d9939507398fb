"""Help for models whose experts no graph can hold: Python loops over the experts that were hit.

`samoyeds_compile.integrations.transformers` for models of the transformers library, `samoyeds_compile.moe_experts` for
hand-written loops. Nothing in here imports transformers: families are recognised by the names of their classes.
"""

from samoyeds_compile.integrations import transformers

__all__ = ["transformers"]
