"""jetmoe, which splits rows by a list of counts, in its experts and in the routed projections around its attention.

Source: ``transformers/models/jetmoe/modeling_jetmoe.py``. The counts stay a tensor here, so that nothing is read on the
host: the gate hands them on, and the projections take them in that form.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.integrations.activations import expression_of
from samoyeds_compile.integrations.experts import run_experts
from samoyeds_compile.integrations.family import Family, tokens


def gating(module: Any, activation: str, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``JetMoeTopKGating.forward``, with the number of rows of each expert as a tensor [E] instead of a list."""
    logits_TE = module.layer(hidden_states).float()
    gates_TK, ids_TK = _top_k(logits_TE, module.top_k)
    experts_E = torch.arange(module.num_experts, device=ids_TK.device)
    counts_E = (ids_TK.flatten().unsqueeze(-1) == experts_E).sum(0)
    order_S = ids_TK.flatten().sort(0)[1]
    token_S = order_S.div(module.top_k, rounding_mode="trunc")
    return order_S, token_S, gates_TK.type_as(hidden_states).flatten()[order_S], counts_E, logits_TE


def parallel_experts(module: Any, activation: str, inputs: Tensor, expert_size: Tensor | list[int]) -> Tensor:
    """``JetMoeParallelExperts.forward``: rows [S, in] sorted by expert -> [S, out]."""
    if not isinstance(expert_size, Tensor):
        expert_size = torch.tensor(expert_size, device=inputs.device)
    return project(inputs, module.weight, expert_size)


def project(inputs_SI: Tensor, weight_E: Tensor, counts_E: Tensor) -> Tensor:
    """One projection of rows sorted by expert, in the dtype in which ``F.linear`` would run it."""
    kind = inputs_SI.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_E.dtype
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    out: Tensor = torch.ops.samoyeds.expert_linear.default(inputs_SI.to(dtype), [weight_E], offsets_E, False)
    return out


def mixture(module: Any, activation: str, layer_input: Tensor) -> Tensor:
    """``JetMoeMoE.forward``: [B, S, H] -> [B, S, H]. The gate runs as a module, since its logits may be recorded."""
    x_TH = layer_input.reshape(-1, layer_input.shape[-1])
    *_, logits_TE = module.router(x_TH)
    gates_TK, ids_TK = _top_k(logits_TE, module.router.top_k)
    out_TH = run_experts(
        x_TH, ids_TK, gates_TK.type_as(x_TH),
        up=[module.input_linear.weight], down=[module.output_linear.weight],
        activation=activation, gate_up_layout="concatenated",
    )  # fmt: skip
    out: Tensor = out_TH.view(layer_input.shape) + module.bias
    return out


def _top_k(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    top_TK, ids_TK = logits_TE.topk(top_k, dim=1)
    return torch.softmax(top_TK, dim=1), ids_TK


def _gating_sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (tokens(module, module.input_size, generator),)


def _parallel_sample(module: Any, generator: torch.Generator) -> tuple[Any, ...]:
    counts = [index % 3 for index in range(module.num_experts)]
    return tokens(module, module.input_size, generator, sum(counts)), counts


def _mixture_sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    return (tokens(module, module.input_size, generator).unsqueeze(0),)


_MODULE = "transformers.models.jetmoe.modeling_jetmoe"
JETMOE = (
    Family(
        _MODULE, "JetMoeMoE", mixture, _mixture_sample,
        lambda module: f"{expression_of(module.activation, 'gate')} * up", lambda module: module.router.num_experts,
    ),
    Family(_MODULE, "JetMoeTopKGating", gating, _gating_sample),
    Family(_MODULE, "JetMoeParallelExperts", parallel_experts, _parallel_sample),
)  # fmt: skip
