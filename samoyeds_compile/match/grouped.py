"""Sort by expert, grouped matrix products, unsort: transformers' default (``grouped_mm``).

Source: ``transformers/integrations/moe.py: grouped_mm_experts_forward``. bf16 weights reach ``torch._grouped_mm``,
others the op ``transformers::grouped_mm_fallback``. On CUDA the histogram is taken of ints instead of floats. Under
expert parallelism ids >= E are sentinels, kept out of the products and masked around them.

    ids_s, perm = sort(ids.reshape(-1));  offs = cumsum(histc(ids_s.float(), bins=E, min=0, max=E-1), 0, int32)
    z = GMM(x[perm // K], gate_up.transpose(-2, -1), offs) [+ b[ids_s]];  h = act(z)
    y = GMM(h, down.transpose(-2, -1), offs) [+ b2[ids_s]] [norm];  y = y * w.reshape(-1)[perm].unsqueeze(-1)
    inv[perm] = arange(S);  out = y[inv].view(T, K, H).sum(1).to(x.dtype)
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch

from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.experts import (
    added_bias,
    collect_members,
    find_activation,
    find_post,
    flat_routing,
    masked,
    reduce_top_k,
    require_one_dtype,
    require_routing,
    require_weight,
    same_size,
    scaled_rows,
    strip_cast,
    strip_transpose,
)
from samoyeds_compile.match.region import Candidate, Decline, Family, Linear, MoERegion, require

GROUPED_MM = ("_grouped_mm", "transformers::grouped_mm_fallback")


class Grouped(Family):
    """Grouped matrix products over rows sorted by expert."""

    name = "grouped"
    summary = "sort by expert, grouped matrix products, unsort (transformers grouped_mm)"

    def candidates(self, graph: ValueGraph) -> list[Candidate]:
        """One candidate for each set of grouped products that share their offsets."""
        by_offsets: dict[Value, list[Value]] = defaultdict(list)
        for product in graph.with_op(*GROUPED_MM):
            if isinstance(product.arg("offs"), Value) and not counted_elsewhere(product):
                by_offsets[product.arg("offs")].append(product)
        return [Candidate(p[0], partial(_match, graph, offs, p)) for offs, p in by_offsets.items()]


def counted_elsewhere(product: Value) -> bool:
    """Whether the offsets sum counts that are no histogram: rows that `SortedRows` takes as they come."""
    offsets = product.arg("offs")
    return product.op == "_grouped_mm" and offsets.op == "cumsum" and strip_cast(offsets.input).op != "histc"


class _Routing:
    """The sort behind the offsets: what the rows of the grouped products are."""

    def __init__(self, offsets: Value, num_experts: int) -> None:
        sorted_ids = _histogrammed(offsets, num_experts)
        is_sorted = sorted_ids.op == "item" and sorted_ids.input.op == "sort" and sorted_ids.arg("key") == 0
        require(is_sorted, "the rows are not sorted by expert", sorted_ids)
        sort = sorted_ids.input
        ascending = sort.arg("dim", -1) in (-1, 0) and not sort.arg("descending", False)
        require(ascending, "the expert ids are not sorted in ascending order", sort)
        self.flat_ids = sort.input
        self.expert_ids = flat_routing(self.flat_ids, "expert ids")
        self.sorted_ids = sorted_ids
        self.perm = _only([u for u in sort.users if u.op == "item" and u.arg("key") == 1], "sort permutation", sort)
        self.num_experts = num_experts
        self.mask = self._sentinel_mask()

    def _sentinel_mask(self) -> Value | None:
        """``(ids_s >= E).unsqueeze(-1)``, where expert parallelism is on."""
        tests = [u for u in self.sorted_ids.users if u.op == "ge" and u.arg("other") == self.num_experts]
        masks = [m for t in tests for m in t.users if m.op == "unsqueeze"]
        return next((mask for mask in masks if mask.users), None)

    @property
    def sentinels(self) -> bool:
        """Whether ids may be >= E: the block masks such rows, or clamps their ids."""
        return self.mask is not None or len(self.row_ids) > 1

    @property
    def row_ids(self) -> tuple[Value, ...]:
        """Values that hold the expert of each row: the sorted ids, and those clamped to stay below E."""
        clamped = [u for u in self.sorted_ids.users if u.op == "clamp" and u.arg("max") == self.num_experts - 1]
        return (self.sorted_ids, *(c for c in clamped if c.arg("min") is None))


def _histogrammed(offsets: Value, num_experts: int) -> Value:
    """The ids whose inclusive running histogram ``offsets`` is."""
    require(offsets.op == "cumsum" and offsets.arg("dim") in (0, -1), "the offsets are no running sum", offsets)
    histogram = offsets.input
    require(histogram.op == "histc", "the offsets do not come from a histogram of expert ids", histogram)
    bounds = (histogram.arg("bins"), histogram.arg("min"), histogram.arg("max"))
    require(bounds == (num_experts, 0, num_experts - 1), "the histogram does not count experts 0 to E-1", histogram)
    return strip_cast(histogram.input)


def _only(found: list[Value], what: str, at: Value) -> Value:
    require(len(found) == 1, f"the block has {len(found)} candidates for its {what}, not one", at)
    return found[0]


def _match(graph: ValueGraph, offsets: Value, products: list[Value]) -> MoERegion:
    require(len(products) == 2, f"{len(products)} grouped products share these offsets, not two", products[0])
    first, second = products
    up_weight, up_flipped = strip_transpose(first.arg("mat2"))
    down_weight, down_flipped = strip_transpose(second.arg("mat2"))
    for weight in (up_weight, down_weight):
        require_weight(weight)
        require(weight.shape[0] == up_weight.shape[0], "the two projections have different numbers of experts", weight)
    require(up_flipped == down_flipped, "one projection is transposed and the other is not", second)
    routing = _Routing(offsets, up_weight.shape[0])
    x, top_k = _gathered_tokens(first, routing)
    up = _projection(first, up_weight, not up_flipped, routing)
    down = _projection(second, down_weight, not down_flipped, routing)
    require_one_dtype(up, down)
    _require_masked(down, routing)
    expert_weights, weighted = _weighting(routing)
    require_routing(routing.expert_ids, expert_weights, top_k)
    require(same_size(x.shape[0], routing.expert_ids.shape[0]), "tokens and expert ids differ in number", x)
    activation = find_activation(up, second.input, down_weight, not down_flipped)
    rows, restored = _restored(weighted, routing)
    output = reduce_top_k(restored, x, top_k, x.shape[1])
    region = MoERegion(
        family=Grouped.name, graph=graph, x=x, expert_ids=routing.expert_ids, expert_weights=expert_weights,
        top_k=top_k, up=up, down=down, carried_post=find_post(down.result, rows), output=output,
        sentinels=routing.sentinels, **activation,
    )  # fmt: skip
    collect_members(region)
    return region


def _gathered_tokens(product: Value, routing: _Routing) -> tuple[Value, Any]:
    """``x[perm // K]`` on the way into the first product: x and K."""
    rows = strip_cast(product.input)
    if rows.op == "masked_fill" and rows.arg("mask") is routing.mask:
        require(rows.arg("value") == 0, "sentinel rows are filled with something other than zero", rows)
        rows = rows.input
    require(
        rows.op == "index" and len(rows.arg("indices")) == 1, "the rows of the first product are not gathered", rows
    )
    require(len(rows.input.shape) == 2, "the tokens are not [T, H]", rows.input)
    token = rows.arg("indices")[0]
    by_k = token.op == "floor_divide" or (token.op == "div" and token.arg("rounding_mode") == "floor")
    require(by_k and token.input is routing.perm, "the rows are not gathered by the sort permutation", token)
    return rows.input, token.arg("other")


def _projection(product: Value, weight: Value, transposed: bool, routing: _Routing) -> Linear:
    require(product.arg("bias") is None and product.arg("out_dtype") is None, "the grouped product has a bias", product)
    require(product.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64), "unknown dtype", product)
    require(weight.dtype == product.dtype, "weight and product differ in dtype", product)
    total, bias = added_bias(product, routing.row_ids, routing.num_experts)
    result = masked(total, routing.mask)
    assert product.dtype is not None
    return Linear((weight,), bias, transposed, result, product.dtype)


def _require_masked(down: Linear, routing: _Routing) -> None:
    """With clamped ids a sentinel's row gets the last expert's bias, unless the block masks it away."""
    exposed = down.bias is not None and routing.sentinels and down.result.op != "masked_fill"
    require(not exposed, "rows of sentinel ids get a bias and are not masked", down.result)


def _weighting(routing: _Routing) -> tuple[Value, Value]:
    """``w.reshape(-1)[perm].unsqueeze(-1)`` times the rows: the weights [T, K] and the product."""
    gathered = [u for u in routing.perm.users if u.op == "index" and u.arg("indices") == (routing.perm,)
                and u.dtype is not None and u.dtype.is_floating_point and len(u.shape) == 1]  # fmt: skip
    weights = _only(gathered, "routing weights in sorted order", routing.perm)
    columns = [u for u in weights.users if u.op == "unsqueeze" and u.arg("dim") in (-1, 1)]
    column = _only(columns, "routing weights as a column", weights)
    return flat_routing(weights.input, "routing weights"), _only(
        [u for u in column.users if u.op == "mul"], "product with the routing weights", column
    )


def _restored(weighted: Value, routing: _Routing) -> tuple[Value, Value]:
    """(rows before the weighting, ``weighted[inv]``), where ``inv`` undoes the sort."""
    rows, _ = scaled_rows(weighted)
    require(len(weighted.users) == 1, "the weighted rows have another reader", weighted)
    restored = weighted.users[0]
    gathers = restored.op == "index" and restored.input is weighted and len(restored.arg("indices")) == 1
    require(gathers, "the weighted rows are not put back into token order", restored)
    _require_inverse(restored.arg("indices")[0], routing.perm)
    return rows, restored


def _require_inverse(inverse: Value, perm: Value) -> None:
    """``inverse`` is the inverse permutation."""
    if inverse.op == "argsort" and inverse.input is perm and not inverse.arg("descending", False):
        return
    written = inverse.op == "index_put" and inverse.arg("indices") == (perm,) and not inverse.arg("accumulate", False)
    require(written, "the rows are put back by something other than the inverse permutation", inverse)
    base, positions = inverse.input, inverse.arg("values")
    require(base.op in ("empty_like", "zeros_like") and base.input is perm, "the inverse is not one index a row", base)
    counts = isinstance(positions, Value) and positions.op == "arange" and positions.arg("start") == 0
    if not counts or positions.arg("step", 1) != 1:
        raise Decline("the inverse permutation is not filled with 0, 1, 2, ...", inverse)
    require(same_size(positions.shape[0], perm.shape[0]), "the inverse permutation has another length", positions)
