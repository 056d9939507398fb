"""One copy of the expert's weights per (token, slot), then batched products: transformers' ``batched_mm``.

Source: ``transformers/integrations/moe.py: batched_mm_experts_forward``; used by exporters and for decoding on CUDA.

    xr = x.repeat_interleave(K, 0);  ids = idx.reshape(-1)
    z = bmm(gate_up[ids], xr.unsqueeze(-1)).squeeze(-1) [+ b[ids]]
    h = act(z);  y = bmm(down[ids], h.unsqueeze(-1)).squeeze(-1) [+ b2[ids]] [norm]
    out = (y * w.reshape(-1).unsqueeze(-1)).view(T, K, H).sum(1).to(x.dtype)

Transposed weights: ``bmm(xr.unsqueeze(1), gate_up[ids]).squeeze(1)``. Expert parallelism: ``ids.clamp(0, E-1)`` and
``w.masked_fill(ids >= E, 0)``.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.experts import (
    added_bias,
    collect_members,
    find_activation,
    find_post,
    flat_routing,
    is_column,
    reduce_top_k,
    require_one_dtype,
    require_routing,
    require_weight,
    same_size,
    scaled_rows,
    strip_cast,
)
from samoyeds_compile.match.region import Candidate, Family, Linear, MoERegion, is_int_tensor, require


class Gathered(Family):
    """Batched products with weights gathered for every (token, slot)."""

    name = "gathered"
    summary = "per-token weight gather and batched products (transformers batched_mm)"

    def candidates(self, graph: ValueGraph) -> list[Candidate]:
        """One candidate for each set of batched products whose weights are gathered by the same ids."""
        by_ids: dict[Value, list[Value]] = defaultdict(list)
        for product in graph.with_op("bmm", "matmul"):
            gather = _weight_gather(product)
            if gather is not None:
                by_ids[gather.arg("indices")[0]].append(product)
        return [Candidate(p[0], partial(_match, graph, ids, p)) for ids, p in by_ids.items()]


def _weight_gather(product: Value) -> Value | None:
    """The operand ``W[ids]`` of a batched product: a stack [E, rows, cols] indexed by a vector of integers."""
    for operand in (product.input, product.arg("mat2")):
        if not isinstance(operand, Value) or operand.op != "index" or len(operand.arg("indices")) != 1:
            continue
        ids = operand.arg("indices")[0]
        if len(operand.input.shape) == 3 and is_int_tensor(ids) and len(ids.shape) == 1:
            return operand
    return None


def _match(graph: ValueGraph, row_ids: Value, products: list[Value]) -> MoERegion:
    require(len(products) == 2, f"{len(products)} batched products share these expert ids, not two", products[0])
    first, second = (_Product(p, row_ids) for p in products)
    require(first.transposed == second.transposed, "one projection is transposed and the other is not", products[1])
    num_experts = first.weight.shape[0]
    require(second.weight.shape[0] == num_experts, "the projections have different numbers of experts", second.weight)
    x, top_k = _repeated_tokens(strip_cast(first.rows))
    flat_ids = _unclamped(row_ids, num_experts)
    expert_ids = flat_routing(flat_ids, "expert ids")
    up, down = (p.linear(row_ids, num_experts) for p in (first, second))
    require_one_dtype(up, down)
    activation = find_activation(up, second.rows, second.weight, second.transposed)
    weighted, rows, expert_weights = _weighting(down, flat_ids, row_ids, num_experts)
    require_routing(expert_ids, expert_weights, top_k)
    require(same_size(x.shape[0], expert_ids.shape[0]), "tokens and expert ids differ in number", x)
    output = reduce_top_k(weighted, x, top_k, x.shape[1])
    region = MoERegion(
        family=Gathered.name, graph=graph, x=x, expert_ids=expert_ids, expert_weights=expert_weights,
        top_k=top_k, up=up, down=down, carried_post=find_post(down.result, rows), output=output,
        sentinels=flat_ids is not row_ids, **activation,
    )  # fmt: skip
    collect_members(region)
    return region


class _Product:
    """One batched product, taken apart: rows in, weight, rows out."""

    def __init__(self, product: Value, row_ids: Value) -> None:
        left, right = product.input, product.arg("mat2")
        self.transposed = right.op == "index" and right.arg("indices") == (row_ids,) and len(right.input.shape) == 3
        gather, column = (right, left) if self.transposed else (left, right)
        axis = (1, -2) if self.transposed else (-1, 2)
        self.product, self.weight = product, gather.input
        require_weight(self.weight)
        require(column.op == "unsqueeze" and column.arg("dim") in axis, "the rows are not one vector a product", column)
        self.rows: Value = column.input
        require(len(product.users) == 1, "the batched product has another reader", product)
        self.squeezed = product.users[0]
        squeezes = self.squeezed.op == "squeeze" and self.squeezed.arg("dim") in axis
        require(squeezes and len(self.squeezed.shape) == 2, "the product is not squeezed to rows", self.squeezed)

    def linear(self, row_ids: Value, num_experts: int) -> Linear:
        """The projection with its bias."""
        result, bias = added_bias(self.squeezed, (row_ids,), num_experts)
        assert self.squeezed.dtype is not None
        return Linear((self.weight,), bias, self.transposed, result, self.squeezed.dtype)


def _repeated_tokens(rows: Value) -> tuple[Value, Any]:
    """``x.repeat_interleave(K, dim=0)``: x and K."""
    repeats = rows.op == "repeat_interleave" and rows.arg("dim") == 0 and isinstance(rows.arg("repeats"), int)
    require(repeats, "the rows of the first product are not every token k times", rows)
    require(len(rows.input.shape) == 2, "the tokens are not [T, H]", rows.input)
    return rows.input, rows.arg("repeats")


def _unclamped(row_ids: Value, num_experts: int) -> Value:
    """The flat ids before expert parallelism clamps its sentinels into range."""
    if row_ids.op != "clamp":
        return row_ids
    bounds = (row_ids.arg("min"), row_ids.arg("max"))
    require(bounds == (0, num_experts - 1), "the expert ids are clamped to something other than 0 to E-1", row_ids)
    return row_ids.input  # type: ignore[no-any-return]


def _weighting(down: Linear, flat_ids: Value, row_ids: Value, num_experts: int) -> tuple[Value, Value, Value]:
    """(weighted rows, rows before the weighting, routing weights [T, K])."""
    end = down.result
    weighted = next(iter(_columns_after(end)), None)
    require(weighted is not None, "the rows are not scaled by routing weights", end)
    assert weighted is not None
    rows, column = scaled_rows(weighted)
    flat = column.input
    if flat_ids is not row_ids:
        flat = _without_mask(flat, flat_ids, num_experts)
    return weighted, rows, flat_routing(flat, "routing weights")


def _columns_after(start: Value) -> list[Value]:
    """Products with a column vector among the values that follow ``start``, nearest first."""
    found, seen, queue = [], {start}, [start]
    while queue and len(seen) < 64:  # a post-expert norm has a dozen values; more is something else
        value = queue.pop(0)
        for user in value.users:
            if user.op == "mul" and any(is_column(o) for o in (user.input, user.arg("other"))):
                found.append(user)
            elif user not in seen:
                seen.add(user)
                queue.append(user)
    return found


def _without_mask(flat: Value, flat_ids: Value, num_experts: int) -> Value:
    """Routing weights before ``masked_fill(ids >= E, 0)``; clamped ids without that mask would change the result."""
    mask = flat.arg("mask") if flat.op == "masked_fill" else None
    sentinel = isinstance(mask, Value) and mask.op == "ge" and mask.input is flat_ids
    require(sentinel, "expert ids are clamped, but the clamped slots keep their routing weight", flat)
    assert isinstance(mask, Value)
    require(mask.arg("other") == num_experts and flat.arg("value") == 0, "the sentinel mask is not ids >= E", flat)
    return flat.input  # type: ignore[no-any-return]
