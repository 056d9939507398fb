"""What to do about a graph break inside a MoE block."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from samoyeds_compile.integrations.families import family_of
from samoyeds_compile.integrations.transformers import is_enabled, runs_eager_experts

EAGER_EXPERTS = (
    "the experts run as a Python loop over the experts that were hit; call "
    "samoyeds_compile.integrations.transformers.enable(model), or "
    'model.set_experts_implementation("grouped_mm"): same results, one graph'
)
UNDECORATED_EXPERTS = (
    "the experts run as a Python loop over the experts that were hit, or over token counts; call "
    "samoyeds_compile.integrations.transformers.enable(model): same results, one graph"
)

_DATA_DEPENDENT = r"nonzero|Dynamic shape operator|data-dependent|Data-dependent"
_ON_HOST = r"Tensor\.item|_local_scalar_dense|tolist"
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        _DATA_DEPENDENT,
        "the code branches or loops on the values of a tensor (which experts were hit); put "
        "@samoyeds_compile.moe_experts on the function that runs the experts, or loop over all of them unconditionally",
    ),
    (
        _ON_HOST,
        "the code reads a tensor's value on the host; put @samoyeds_compile.moe_experts on the function that runs the "
        "experts, or keep counts and offsets in tensors",
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
        model: the model; a transformers model whose experts run as a loop has a remedy of its own.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    if re.search(f"{_DATA_DEPENDENT}|{_ON_HOST}", reason):
        switchable = next(filter(None, map(remedy_of, modules)), None)
        if switchable is not None:
            return switchable
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, reason)), _OTHER)


def cut_by_ddp() -> str:
    """A hint for a block that looks incomplete in a graph of DistributedDataParallel; empty elsewhere.

    Dynamo's DDPOptimizer cuts graphs where a bucket of gradients is full, through the middle of a block if need be.
    """
    inside = torch.distributed.is_available() and DistributedDataParallel._get_active_ddp_module() is not None
    if not inside or torch._dynamo.utils.get_optimize_ddp_mode() != "ddp_optimizer":
        return ""
    return "; DDP's buckets may have cut the block: set torch._dynamo.config.optimize_ddp = False"


def remedy_of(module: nn.Module) -> str | None:
    """What makes the experts of a transformers model capturable; None for any other module, and where it is done."""
    if runs_eager_experts(module):
        return EAGER_EXPERTS
    if family_of(module) is not None and not is_enabled(module):
        return UNDECORATED_EXPERTS
    return None
