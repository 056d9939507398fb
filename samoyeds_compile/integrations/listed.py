"""Families with one module for each expert, which take masks instead of ids: switch_transformers, nllb_moe.

Source: ``transformers/models/<name>/modeling_<name>.py``. Each loops over ``nonzero()`` of the experts that were hit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from samoyeds_compile.integrations.activations import expression_of
from samoyeds_compile.integrations.experts import run_experts
from samoyeds_compile.integrations.family import Family, routing, tokens


def switch_transformers(
    module: Any, activation: str, hidden_states: Tensor, selected_experts: Tensor, routing_weights: Tensor
) -> Tensor:
    """``SwitchTransformersExperts.forward``: [T, H] -> [T, H].

    ``selected_experts`` is one-hot, [T, 1, E], all zeros for a token over its expert's capacity. Such a token gets the
    id E, which belongs to nobody.
    """
    experts = _experts(module)
    kept_T1 = selected_experts.sum(-1) > 0
    ids_T1 = torch.where(kept_T1, selected_experts.argmax(-1), len(experts))
    return run_experts(
        hidden_states, ids_T1, routing_weights,
        up=[e.wi.weight for e in experts], down=[e.wo.weight for e in experts],
        activation=activation, dropout=_dropout(experts[0]),
    )  # fmt: skip


def nllb_moe(module: Any, activation: str, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """``NllbMoeExperts.forward``: [T, H] -> [T, H].

    The library reads the *entries* of ``router_mask`` ([T, E], one-hot or zero) as expert ids: a token goes to expert 1
    with the probabilities where the mask is 1, and to expert 0 with those where it is 0. The others are never hit. This
    does the same, with the probabilities of each of the two experts summed beforehand.
    """
    experts = _experts(module)[:2]
    ids_TK = torch.arange(2, device=router_mask.device).expand(hidden_states.shape[0], 2)
    chosen_TE = router_mask.bool()
    weights_TK = torch.stack([(router_probs * mask).sum(-1) for mask in (~chosen_TE, chosen_TE)], dim=-1)
    drops = module.moe_token_dropout if module.training else 0.0
    if drops:  # on the weighed contributions of each expert, so they are needed one by one
        hidden_states, ids_TK, weights_TK = (
            hidden_states.repeat_interleave(2, 0), ids_TK.reshape(-1, 1), weights_TK.reshape(-1, 1),
        )  # fmt: skip
    out = run_experts(
        hidden_states, ids_TK, weights_TK,
        up=[e.fc1.weight for e in experts], down=[e.fc2.weight for e in experts],
        up_bias_E=torch.stack([e.fc1.bias for e in experts]), down_bias_E=torch.stack([e.fc2.bias for e in experts]),
        activation=activation, dropout=_dropout(experts[0]),
    )  # fmt: skip
    if drops:
        return F.dropout(out, drops).view(-1, 2, out.shape[-1]).sum(1)
    return out if module.training else out * (1 - module.moe_token_dropout)


def _experts(module: Any) -> list[Any]:
    return [module[f"expert_{index}"] for index in range(module.num_experts)]


def _dropout(expert: Any) -> float:
    return float(expert.dropout.p) if expert.dropout.training else 0.0


def _activation(module: Any) -> str:
    return expression_of(module["expert_0"].act, "x")


def _switch_sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    x_TH = tokens(module, module["expert_0"].wi.in_features, generator)
    ids_T1, weights_T1 = routing(x_TH, module.num_experts, generator, top_k=1)
    mask_T1E = F.one_hot(ids_T1, module.num_experts)
    mask_T1E[0] = 0  # over capacity
    return x_TH, mask_T1E, weights_T1


def _nllb_sample(module: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    x_TH = tokens(module, module["expert_0"].fc1.in_features, generator)
    ids_TK, weights_TK = routing(x_TH, module.num_experts, generator)
    mask_TE = F.one_hot(ids_TK[:, 0], module.num_experts)
    mask_TE[0] = 0  # over capacity
    probs_TE = x_TH.new_zeros(x_TH.shape[0], module.num_experts).scatter(1, ids_TK, weights_TK)
    return x_TH, mask_TE, probs_TE


LISTED = (
    Family(
        "transformers.models.switch_transformers.modeling_switch_transformers", "SwitchTransformersExperts",
        switch_transformers, _switch_sample, _activation, lambda module: module.num_experts,
    ),
    Family(
        "transformers.models.nllb_moe.modeling_nllb_moe", "NllbMoeExperts", nllb_moe, _nllb_sample, _activation,
        lambda module: module.num_experts,
    ),
)  # fmt: skip
