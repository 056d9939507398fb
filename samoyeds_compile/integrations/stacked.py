"""Families whose weights are stacks: dbrx, longcat_flash, step3p7.

Source: ``transformers/models/<name>/modeling_<name>.py``. Each loops over ``nonzero()`` of the experts that were hit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from samoyeds_compile.integrations.activations import expression_of
from samoyeds_compile.integrations.experts import run_experts
from samoyeds_compile.integrations.family import Family, Unsupported, routing, tokens


def dbrx(module: Any, activation: str, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``DbrxExperts.forward``: [B, S, H] -> [B, S, H]; w1, v1 and w2 are flat, [E * I, H] each, w2 as [in, out]."""
    mlp = module.mlp
    shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
    out_TH = run_experts(
        hidden_states.reshape(-1, module.hidden_size), top_k_index, top_k_weights,
        gate=[mlp.w1.view(shape)], up=[mlp.v1.view(shape)], down=[mlp.w2.view(shape).transpose(1, 2)],
        activation=activation, gate_up_layout="separate",
    )  # fmt: skip
    return out_TH.view(hidden_states.shape[0], -1, module.hidden_size)


def _dbrx_sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    x_TH = tokens(module, module.hidden_size, generator)
    return (x_TH.unsqueeze(0), *routing(x_TH, module.num_experts, generator))


def longcat_flash(
    module: Any, activation: str, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``LongcatFlashExperts.forward``: [T, H] -> [T, H]; ids from ``num_routed_experts`` on are the identity.

    To the op those ids belong to nobody; the tokens times the weights of these ids are added here.
    """
    routed = module.num_routed_experts
    identity_T1 = torch.where(top_k_index >= routed, top_k_weights, 0).sum(-1, keepdim=True)
    passed_TH = (hidden_states * identity_T1).to(hidden_states.dtype)
    if module.gate_up_proj is None:
        return passed_TH
    out_TH = run_experts(
        hidden_states, top_k_index, top_k_weights,
        up=[module.gate_up_proj[:routed]], down=[module.down_proj],
        activation=activation, gate_up_layout="concatenated",
    )  # fmt: skip
    return out_TH + passed_TH if module.zero_expert_num else out_TH


def step3p7(module: Any, activation: str, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``Step3p7Experts.forward``: [T, H] -> [T, H]; gate and up are clamped after the activation, if at all."""
    return run_experts(
        hidden_states, top_k_index, top_k_weights,
        up=[module.gate_up_proj], down=[module.down_proj],
        activation=activation, gate_up_layout="concatenated",
    )  # fmt: skip


def _step3p7_activation(module: Any) -> str:
    gate = expression_of(module.act_fn, "gate")
    if math.isinf(module.limit):
        return f"{gate} * up"
    limit = float(module.limit)
    return f"clamp({gate}, None, {limit}) * clamp(up, {-limit}, {limit})"


def _gated(module: Any) -> str:
    return f"{expression_of(module.act_fn, 'gate')} * up"


def _longcat_sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    if module.gate_up_proj is None:
        raise Unsupported("it has no routed experts")
    x_TH = tokens(module, module.hidden_size, generator)
    return (x_TH, *routing(x_TH, module.total_experts, generator, top_k=module.zero_expert_num + 2))


def _step3p7_sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    x_TH = tokens(module, module.hidden_dim, generator)
    return (x_TH, *routing(x_TH, module.num_experts, generator))


STACKED = (
    Family(
        "transformers.models.dbrx.modeling_dbrx", "DbrxExperts", dbrx, _dbrx_sample,
        lambda module: f"{expression_of(module.mlp.activation_fn, 'gate')} * up", lambda module: module.num_experts,
    ),
    Family(
        "transformers.models.longcat_flash.modeling_longcat_flash", "LongcatFlashExperts", longcat_flash,
        _longcat_sample, _gated, lambda module: module.num_routed_experts,
    ),
    Family(
        "transformers.models.step3p7.modeling_step3p7", "Step3p7Experts", step3p7,
        _step3p7_sample, _step3p7_activation, lambda module: module.num_experts,
    ),
)  # fmt: skip
