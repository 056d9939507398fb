"""Reference twins: what each ``samoyeds::`` op means, in the plainest torch there is, one token at a time.

Slow on purpose; tests compare the ops with these, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.ops.expert_up import split_gate
from samoyeds_compile.ops.route import NO_SIGN, Plan


def route(expert_ids_TK: Tensor, num_experts: int) -> Plan:
    """Twin of ``samoyeds::route``."""
    flat = [e & NO_SIGN for e in expert_ids_TK.flatten().tolist()]
    order = sorted(range(len(flat)), key=lambda position: flat[position])
    slot = sorted(range(len(flat)), key=order.__getitem__)
    expert = [flat[position] for position in order]
    offsets = [sum(e <= last for e in flat) for last in range(num_experts)]
    as_int64 = [torch.tensor(numbers, dtype=torch.int64) for numbers in (order, slot, expert)]
    return Plan(
        as_int64[0], as_int64[1].view(expert_ids_TK.shape), as_int64[2], torch.tensor(offsets, dtype=torch.int32)
    )


def expert_linear(x_SI: Tensor, weight_E: Tensor, offsets_E: Tensor, in_out: bool) -> Tensor:
    """Twin of ``samoyeds::expert_linear``; rows that belong to nobody are zero."""
    rows, start = [], 0
    for matrix, end in zip(weight_E, offsets_E.tolist(), strict=True):
        rows.append(x_SI[start:end] @ (matrix if in_out else matrix.t()))
        start = end
    width = weight_E.shape[2 if in_out else 1]
    return torch.cat([*rows, x_SI.new_zeros(x_SI.shape[0] - start, width)])


def expert_outer(x_SI: Tensor, grad_SO: Tensor, offsets_E: Tensor, in_out: bool) -> Tensor:
    """Twin of ``samoyeds::expert_outer``."""
    products, start = [], 0
    for end in offsets_E.tolist():
        product = grad_SO[start:end].t() @ x_SI[start:end]
        products.append(product.t() if in_out else product)
        start = end
    return torch.stack(products)


def expert(
    x_H: Tensor,
    index: int,
    gate_E: Tensor | None,
    up_E: Tensor,
    down_E: Tensor,
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> Tensor:
    """One expert on one token, [H] -> [H]."""

    def linear(v: Tensor, weight_E: Tensor, bias_E: Tensor | None) -> Tensor:
        matrix = weight_E[index].t() if weight_layout == "in_out" else weight_E[index]
        return matrix @ v if bias_E is None else matrix @ v + bias_E[index]

    z = linear(x_H, up_E, up_bias_E)
    inputs = split_gate(z, gate_up_layout)
    if gate_E is not None:
        inputs = {"gate": linear(x_H, gate_E, gate_bias_E), "up": z}
    return linear(expr.evaluate(activation, inputs), down_E, down_bias_E)


def moe_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Tensor | None,
    up_E: Tensor,
    down_E: Tensor,
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> Tensor:
    """Twin of ``samoyeds::moe_experts`` in the dtype of its operands."""
    out_TH = []
    for x_H, ids, weights_K in zip(x_TH, expert_ids_TK.tolist(), expert_weights_TK, strict=True):
        total = 0 * x_H
        for index, weight in zip(ids, weights_K, strict=True):
            if 0 <= index < up_E.shape[0]:
                total = total + weight * expert(
                    x_H, index, gate_E, up_E, down_E, gate_bias_E, up_bias_E, down_bias_E, activation,
                    gate_up_layout, weight_layout,
                )  # fmt: skip
        out_TH.append(total)
    return torch.stack(out_TH) if out_TH else 0 * x_TH


def router(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    scoring: str,
    order: str,
    top_k: int,
    weights_from: str,
    renormalise: str,
    epsilon: float,
    scale: float,
    n_group: int,
    topk_group: int,
    group_score: str,
    masked_score: float,
) -> tuple[Tensor, Tensor]:
    """Twin of ``samoyeds::router`` for sorted choices without ties."""
    weights, ids = [], []
    for logits_E in logits_TE:
        scores_E = logits_E if order == "topk_then_score" else _score(logits_E, scoring)
        choice_E = scores_E if bias_E is None else scores_E + bias_E.reshape(-1)
        if n_group > 1:
            choice_E = _best_groups(choice_E, n_group, topk_group, group_score, masked_score)
        chosen = sorted(range(len(choice_E)), key=choice_E.tolist().__getitem__, reverse=True)[:top_k]
        weights_K = (choice_E if weights_from == "choice" else scores_E)[chosen]
        if order == "topk_then_score":
            weights_K = _score(weights_K, scoring)
        divisor = {"none": 1, "sum": weights_K.sum() + epsilon, "clamped_sum": weights_K.sum().clamp(min=epsilon)}
        weights.append(weights_K / divisor[renormalise] * scale)
        ids.append(torch.tensor(chosen))
    return torch.stack(weights), torch.stack(ids)


def _score(logits: Tensor, scoring: str) -> Tensor:
    return 1 / (1 + (-logits).exp()) if scoring == "sigmoid" else logits.exp() / logits.exp().sum()


def _best_groups(choice_E: Tensor, n_group: int, topk_group: int, group_score: str, masked_score: float) -> Tensor:
    groups = choice_E.chunk(n_group)
    count = 1 if group_score == "max" else 2
    totals = [sum(sorted(group.tolist())[-count:]) for group in groups]
    best = sorted(range(n_group), key=totals.__getitem__)[-topk_group:]
    return torch.cat([g if i in best else torch.full_like(g, masked_score) for i, g in enumerate(groups)])
