"""Reference twins: what each ``samoyeds::`` op means, in the plainest torch there is, one token at a time.

Slow on purpose; tests compare the ops with these, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samoyeds_codegen import expr
from samoyeds_compile.layout.algebra import Layout
from samoyeds_compile.ops.expert_up import split_gate
from samoyeds_compile.ops.operands import is_stack, num_experts, out_width
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


def matrix(weights: Sequence[Tensor], index: int) -> Tensor:
    """The matrix of one expert, of either form of a weight operand."""
    return weights[0][index] if is_stack(weights) else weights[index]


def expert_linear(x_SI: Tensor, weights: Sequence[Tensor], offsets_E: Tensor, in_out: bool) -> Tensor:
    """Twin of ``samoyeds::expert_linear``; rows that belong to nobody are zero."""
    rows, start = [], 0
    for expert_index, end in enumerate(offsets_E.tolist()):
        weight = matrix(weights, expert_index)
        rows.append(x_SI[start:end] @ (weight if in_out else weight.t()))
        start = end
    return torch.cat([*rows, x_SI.new_zeros(x_SI.shape[0] - start, out_width(weights, in_out))])


def expert_outer(x_SI: Tensor, grad_SO: Tensor, offsets_E: Tensor, in_out: bool) -> Tensor:
    """Twin of ``samoyeds::expert_outer``."""
    products, start = [], 0
    for end in offsets_E.tolist():
        product = grad_SO[start:end].t() @ x_SI[start:end]
        products.append(product.t() if in_out else product)
        start = end
    return torch.stack(products)


def linear(v: Tensor, index: int, weight_E: Sequence[Tensor], bias_E: Tensor | None, weight_layout: str) -> Tensor:
    """One projection of one expert on one row, [I] -> [O]."""
    weight = matrix(weight_E, index)
    y = (weight.t() if weight_layout == "in_out" else weight) @ v
    return y if bias_E is None else y + bias_E[index]


def up(
    x_H: Tensor,
    index: int,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> Tensor:
    """First projection and activation of one expert on one token, [H] -> [I]."""
    z = linear(x_H, index, up_E, up_bias_E, weight_layout)
    inputs = split_gate(z, gate_up_layout)
    if gate_E:
        inputs = {"gate": linear(x_H, index, gate_E, gate_bias_E, weight_layout), "up": z}
    return expr.evaluate(activation, inputs)  # type: ignore[no-any-return]


def expert(
    x_H: Tensor,
    index: int,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> Tensor:
    """One expert on one token, [H] -> [H]."""
    h_I = up(x_H, index, gate_E, up_E, gate_bias_E, up_bias_E, activation, gate_up_layout, weight_layout)
    return linear(h_I, index, down_E, down_bias_E, weight_layout)


def moe_experts(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
    weighting: str,
) -> Tensor:
    """Twin of ``samoyeds::moe_experts`` (and ``experts_gathered``) in the dtype of its operands."""
    operands = gate_E, up_E, down_E, gate_bias_E, up_bias_E, down_bias_E, activation, gate_up_layout, weight_layout
    out_TH = []
    for x_H, ids, weights_K in zip(x_TH, expert_ids_TK.tolist(), expert_weights_TK, strict=True):
        total = 0 * x_H
        for index, weight in zip(ids, weights_K, strict=True):
            if 0 <= index < num_experts(up_E):
                before, after = (weight, 1) if weighting == "input" else (1, weight)
                total = total + after * expert(before * x_H, index, *operands)
        out_TH.append(total)
    return torch.stack(out_TH) if out_TH else 0 * x_TH


def experts_batched(
    x_ECH: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    down_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    down_bias_E: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> Tensor:
    """Twin of ``samoyeds::experts_batched`` in the dtype of its operands."""
    operands = gate_E, up_E, down_E, gate_bias_E, up_bias_E, down_bias_E, activation, gate_up_layout, weight_layout
    if x_ECH.shape[1] == 0:
        return 0 * x_ECH
    return torch.stack(
        [torch.stack([expert(x_H, index, *operands) for x_H in x_CH]) for index, x_CH in enumerate(x_ECH)]
    )


def expert_up(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gate_E: Sequence[Tensor],
    up_E: Sequence[Tensor],
    gate_bias_E: Tensor | None,
    up_bias_E: Tensor | None,
    expert_weights_TK: Tensor | None,
    activation: str,
    gate_up_layout: str,
    weight_layout: str,
) -> Tensor:
    """Twin of ``samoyeds::expert_up``, from the ids; only the rows that belong to an expert, [S', I]."""
    operands = gate_E, up_E, gate_bias_E, up_bias_E, activation, gate_up_layout, weight_layout
    rows_H = x_TH.repeat_interleave(expert_ids_TK.shape[1], 0)
    if expert_weights_TK is not None:
        rows_H = rows_H * expert_weights_TK.reshape(-1, 1)
    slots = _owned_slots(expert_ids_TK, num_experts(up_E))
    return torch.stack([up(rows_H[position], index, *operands) for position, index in slots])


def expert_project(
    h_SI: Tensor,
    expert_ids_TK: Tensor,
    down_E: Sequence[Tensor],
    down_bias_E: Tensor | None,
    weight_layout: str,
) -> Tensor:
    """Twin of ``samoyeds::expert_project``, from the ids; only the rows that belong to an expert, [S', H]."""
    slots = _owned_slots(expert_ids_TK, num_experts(down_E))
    return torch.stack(
        [linear(h_I, index, down_E, down_bias_E, weight_layout) for h_I, (_, index) in zip(h_SI, slots, strict=False)]
    )


def combine(y_SH: Tensor, expert_ids_TK: Tensor, experts: int, expert_weights_TK: Tensor | None) -> Tensor:
    """Twin of ``samoyeds::combine``, from the ids."""
    tokens, top_k = expert_ids_TK.shape
    out_TH = [y_SH.new_zeros(y_SH.shape[1]) for _ in range(tokens)]
    for y_H, (position, _) in zip(y_SH, _owned_slots(expert_ids_TK, experts), strict=False):
        weight = 1 if expert_weights_TK is None else expert_weights_TK.reshape(-1)[position]
        out_TH[position // top_k] = out_TH[position // top_k] + weight * y_H
    return torch.stack(out_TH)


def _owned_slots(expert_ids_TK: Tensor, experts: int) -> list[tuple[int, int]]:
    """(position in the ids made flat, expert) of each slot that belongs to an expert, in slot order."""
    flat = enumerate(expert_ids_TK.flatten().tolist())
    return sorted(((position, e) for position, e in flat if 0 <= e < experts), key=lambda slot: slot[1])


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


def convert_layout(x: Tensor, plan: Plan, source: str, target: str) -> Tensor:
    """Twin of ``samoyeds::convert_layout``: one element at a time, by its row and feature."""
    before, after = Layout.named(source), Layout.named(target)
    features = x.shape[0] * 2 if before.form == "pairs" else x.shape[0 if before.order == "feature" else 1]
    rows = _row_numbers(plan, after)
    out = torch.zeros(rows[-1], features, dtype=torch.float64)
    for key, row in enumerate(rows[:-1]):  # key: a token, or a position in the ids
        slots = plan.slot_TK.shape[1]
        token, position = (key // slots, key) if after.rows == "slots" else (key, key * slots)
        read = _row_numbers(plan, before)[token if before.rows == "tokens" else position]
        for feature in range(features):
            out[row, feature] = x[_index(before, read, feature)]
    if after.form == "pairs":
        out = torch.stack([out[:, 0::2].t(), out[:, 1::2].t()], dim=-1)
    elif after.order == "feature":
        out = out.t()
    return out.to(after.dtype)


def _row_numbers(plan: Plan, layout: Layout) -> list[int]:
    """The row of each token, or of each position in the ids; at the end how many rows there are."""
    tokens, top_k = plan.slot_TK.shape
    if layout.rows == "tokens":
        return [*range(tokens), tokens]
    ends, first, starts = [0, *plan.offsets_E.tolist()], 0, []
    for expert in range(len(ends) - 1):
        starts.append(first)
        first += -(-(ends[expert + 1] - ends[expert]) // layout.pad) * layout.pad
    owners = [min(int(e), len(starts)) for e in plan.expert_S]
    places = [slot - ends[owner] + [*starts, first][owner] for slot, owner in enumerate(owners)]
    slots = plan.slot_TK.flatten().tolist()
    return [*(places[slot] for slot in slots), tokens * top_k + len(starts) * (layout.pad - 1)]


def _index(layout: Layout, row: int, feature: int) -> tuple[int, ...]:
    if layout.form == "pairs":
        return feature // 2, row, feature % 2
    return (feature, row) if layout.order == "feature" else (row, feature)
