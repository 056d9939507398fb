"""What to do about a graph break inside a MoE block."""

from __future__ import annotations

import re

from torch import nn

EAGER_EXPERTS = (
    "the experts run as a Python loop over the experts that were hit; call "
    'model.set_experts_implementation("grouped_mm") before compiling: same results, one graph'
)

_DATA_DEPENDENT = r"nonzero|Dynamic shape operator|data-dependent|Data-dependent"
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        _DATA_DEPENDENT,
        "the code branches or loops on the values of a tensor (which experts were hit); loop over all experts without "
        "a condition, or use grouped or batched expert products",
    ),
    (
        r"Tensor\.item|_local_scalar_dense|tolist",
        "the code reads a tensor's value on the host; keep counts and offsets in tensors",
    ),
    (
        r"torch\.compiler\.disable|skip|graph_break\(\)",
        "the code asks for the break; remove torch.compiler.disable or graph_break around the block",
    ),
)
_OTHER = "see Dynamo's own hints: TORCH_LOGS=graph_breaks"


def remedy_for(reason: str, model: object) -> str:
    """One line that says how to get rid of a graph break.

    Args:
        reason: Dynamo's text.
        model: the model; a transformers model whose experts run eagerly has a remedy of its own.
    """
    switchable = isinstance(model, nn.Module) and any(runs_eager_experts(m) for m in model.modules())
    if switchable and re.search(_DATA_DEPENDENT, reason):
        return EAGER_EXPERTS
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, reason)), _OTHER)


def runs_eager_experts(module: nn.Module) -> bool:
    """Whether a module is a set of transformers experts that runs its eager loop and could run otherwise.

    Source: ``transformers/integrations/moe.py: use_experts_implementation``, which sets the attributes looked for.
    """
    decorated = hasattr(module, "_is_expert_parallel") and hasattr(module, "is_concatenated")
    return decorated and getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager"
