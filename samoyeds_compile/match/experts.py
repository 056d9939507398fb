"""Checks that every family shares: weights, routing operands, projections, the top-k reduction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from samoyeds_compile.graph.edit import escaping
from samoyeds_compile.graph.ops import ASSERTIONS
from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.activation import carry, read_activation
from samoyeds_compile.match.region import Carried, Linear, MoERegion, is_int_tensor, require

MATRIX_PRODUCTS = frozenset(
    "_grouped_mm transformers::grouped_mm_fallback bmm matmul mm linear einsum baddbmm addmm mv".split()
)
_MADE_LIKE = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty".split()
)
_TAKEN_APART = frozenset(("item", "slice", "select"))
_SHAPED_AS = frozenset(("view_as", "reshape_as", "expand_as", "type_as"))


def strip_cast(value: Value) -> Value:
    """The value before a ``.to(dtype)``; of several in a row only one may change the dtype, for two round twice."""
    changed = False
    while value.op == "to" and not (changed and value.dtype != value.input.dtype):
        changed = changed or value.dtype != value.input.dtype
        value = value.input
    return value


def is_column(value: Any) -> bool:
    """``flat.unsqueeze(-1)`` of a vector: one number for each row."""
    if not (isinstance(value, Value) and value.op == "unsqueeze" and value.arg("dim") in (-1, 1)):
        return False
    return len(value.input.shape) == 1


def scaled_rows(product: Value) -> tuple[Value, Value]:
    """(rows, column) of a product of rows [S, H] with a column [S, 1]."""
    rows, column = product.input, product.arg("other")
    if is_column(rows):
        rows, column = column, rows
    require(isinstance(rows, Value) and len(rows.shape) == 2, "the routing weights scale no rows", product)
    return rows, column


def strip_transpose(weight: Value) -> tuple[Value, bool]:
    """A stack of matrices before ``.transpose(-2, -1)``, and whether it was transposed."""
    if weight.op == "transpose" and {weight.arg("dim0"), weight.arg("dim1")} in ({-2, -1}, {1, 2}):
        return weight.input, True
    return weight, False


def require_weight(weight: Value) -> None:
    """A weight is a floating point stack [E, rows, cols] of static shape."""
    require(
        isinstance(weight, Value) and len(weight.shape) == 3, "the expert weight is no stack [E, rows, cols]", weight
    )
    require(weight.dtype is not None and weight.dtype.is_floating_point, "the expert weight is not floating", weight)
    require(all(isinstance(s, int) for s in weight.shape), "the expert weight has a symbolic size", weight)


def flat_routing(value: Value, what: str) -> Value:
    """The [T, K] tensor behind ``reshape(-1)``."""
    flattened = value.op in ("reshape", "view") and tuple(value.arg("shape")) == (-1,)
    flattened = flattened or (value.op == "flatten" and set(value.args) == {"input"})
    require(flattened, f"the {what} are not a [T, K] tensor made flat", value)
    table: Value = value.input
    require(len(table.shape) == 2, f"the {what} are not two-dimensional", table)
    return table


def require_routing(expert_ids: Value, expert_weights: Value, top_k: Any) -> None:
    """Ids and weights are [T, K] with the K that the rest of the block uses."""
    require(is_int_tensor(expert_ids), "the expert ids are no integer tensor", expert_ids)
    require(isinstance(top_k, int), "the number of experts a token goes to is not static", expert_ids)
    require(expert_ids.shape[1] == top_k, "the block uses another k than the expert ids have", expert_ids)
    require(expert_weights.shape[1] == top_k, "the routing weights have another k than the ids", expert_weights)
    floating = expert_weights.dtype is not None and expert_weights.dtype.is_floating_point
    require(floating, "the routing weights are not floating", expert_weights)


def only_user(value: Value, op: str) -> Value | None:
    """The single user of ``value`` if it is computed by ``op``."""
    return value.users[0] if len(value.users) == 1 and value.users[0].op == op else None


def added_bias(projection: Value, ids: tuple[Value, ...], num_experts: int) -> tuple[Value, Value | None]:
    """``projection + bias[ids]``: the sum and the bias [E, out], or the projection itself and None."""
    total = only_user(projection, "add")
    if total is None or total.arg("alpha", 1) != 1:
        return projection, None
    other = total.arg("other") if total.input is projection else total.input
    if not (isinstance(other, Value) and other.op == "index" and other.arg("indices")[0] in ids):
        return projection, None
    bias = other.input
    fits = len(other.arg("indices")) == 1 and len(bias.shape) == 2 and bias.shape[0] == num_experts
    fits = fits and bias.shape[1] in (1, projection.shape[-1])
    require(fits, "the rows added to the projection are no bias [E, out]", other)
    require(total.dtype == projection.dtype, "adding the bias changes the dtype", total)
    return total, bias


def masked(value: Value, mask: Value | None) -> Value:
    """``value.masked_fill(mask, 0)`` if that is what happens to it next, else ``value``."""
    filled = only_user(value, "masked_fill")
    if mask is None or filled is None or filled.arg("mask") is not mask:
        return value
    require(filled.arg("value") == 0, "sentinel rows are filled with something other than zero", filled)
    return filled


def require_one_dtype(up: Linear, down: Linear) -> None:
    """Both projections compute in the same dtype."""
    require(up.compute_dtype == down.compute_dtype, "the two projections compute in different dtypes", down.result)


def find_activation(up: Linear, down_rows: Value, down: Value, transposed: bool) -> dict[str, Any]:
    """The activation between ``up`` and the rows that enter ``down``, as `MoERegion` fields."""
    width = down.shape[1 if transposed else 2]
    packed = up.out_features
    require(packed in (width, 2 * width), "the first projection is neither I nor 2I wide", up.weights[0])
    text, layout, carried = read_activation(up.result, strip_cast(down_rows), packed, width)
    return {"activation": text, "gate_up_layout": layout, "carried_activation": carried}


def find_post(projection: Value, weighted_rows: Value) -> Carried | None:
    """What stands between the second projection and the routing weights."""
    return None if weighted_rows is projection else carry(projection, weighted_rows)


def reduce_top_k(weighted: Value, region_x: Value, top_k: int, hidden: int) -> Value:
    """``weighted.view(T, K, H).sum(1)[.to(dtype)]``: the block's output."""
    require(len(weighted.users) == 1, "the weighted rows have another reader", weighted)
    view = weighted.users[0]
    require(
        view.op in ("view", "reshape") and len(view.shape) == 3, "the weighted rows are not viewed as [T, K, H]", view
    )
    tokens, k, width = view.shape
    require(k == top_k and width == hidden, "the weighted rows are not viewed as [T, K, H]", view)
    require(same_size(tokens, region_x.shape[0]), "the view has another number of tokens than the input", view)
    total = only_user(view, "sum")
    require(total is not None, "the k contributions of a token are not summed", view)
    assert total is not None
    require(total.arg("dim") in (1, (1,), -2, (-2,)), "the sum is not over k", total)
    require(not total.arg("keepdim", False) and total.arg("dtype") is None, "the sum keeps k or changes dtype", total)
    cast = only_user(total, "to")
    return cast or total


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are the same number or the same expression; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    expressions = [s.node.expr if isinstance(s, torch.SymInt) else s for s in (a, b)]
    return bool(expressions[0] == expressions[1])


def collect_members(region: MoERegion) -> None:
    """Set the region's ``members``, ``prologue`` and ``shapes``: what is between its inputs and its output.

    Raises:
        Decline: the block reads something that the match did not account for, or writes to it.
    """
    prologue, lent = _between(region.computed, region)
    members, more = _between([region.output], region)
    members -= prologue
    region.shapes = [v for v in {**lent, **more} if v not in members | prologue | set(region.inputs)]
    members |= _assertions(members)
    _require_live_inputs(region, members)
    _require_one_context(members)
    repeated = [v for v in escaping(members, region.output) if v.op in MATRIX_PRODUCTS]
    require(not repeated, "rows of the experts are read outside the block and would be computed twice", *repeated[:1])
    region.prologue = sorted(prologue, key=lambda v: v.position)
    region.members = sorted(members, key=lambda v: v.position)


def _between(results: Iterable[Value], region: MoERegion) -> tuple[set[Value], dict[Value, None]]:
    """Every value between the region's inputs and some results, and the values that only lend them their shape."""
    inputs = set(region.inputs)
    members: set[Value] = set()
    lent: dict[Value, None] = {}
    stack = list(results)
    while stack:
        value = stack.pop()
        if value in inputs or value in members:
            continue
        require(value.op not in ("placeholder", "get_attr"), "the block reads an operand that has no role in it", value)
        require(value.op != "aliased_write", "the block reads a tensor that shares storage with one written to", value)
        require(not value.writes_input, "the block writes to one of its inputs", value)
        members.add(value)
        lenders = _shape_lenders(value)
        lent.update(dict.fromkeys(lenders))
        read = value.op == "item" and value.arg("key") is None  # Dynamo records nothing of what ``tolist`` reads
        stack.extend(o for o in value.operands if (read or o.is_tensor or _reads_data(o)) and o not in lenders)
    return members, lent


def _reads_data(size: Value) -> bool:
    """Whether a size is a number that stands in a tensor (``counts[e].item()``), alone or in a formula."""
    if size.op == "item" and size.arg("key") is None:
        return True
    given = size.is_tensor or size.op in ("placeholder", "sym_size", "size")
    return not given and any(map(_reads_data, size.operands))


def _assertions(members: set[Value]) -> set[Value]:
    """Sizes of members, and assertions on them, that nothing outside the block needs: they go with it."""
    found: set[Value] = set()
    queue = list(members)
    while queue:
        for user in queue.pop().users:
            if user not in found and user not in members and _is_size(user):
                found.add(user)
                queue.append(user)
    inside = members | found
    needed = [v for v in found if any(u not in inside for u in v.users)]
    while needed:
        value = needed.pop()
        if value in found:
            found.discard(value)
            needed += [o for o in value.operands if o in found]
    return found


def _is_size(value: Value) -> bool:
    """Whether a value is a number read from a tensor, a part of a tensor to read it from, or a statement on numbers."""
    number = isinstance(value.example, (int, torch.SymInt, torch.SymBool, bool))
    return number or value.op in _TAKEN_APART or value.op in ASSERTIONS


def _shape_lenders(value: Value) -> list[Value]:
    """Operands of which only shape, dtype and device matter."""
    if value.op in _MADE_LIKE:
        return [value.input]
    other = value.arg("other", value.arg("1")) if value.op in _SHAPED_AS else None
    return [other] if isinstance(other, Value) else []


def _require_one_context(members: set[Value]) -> None:
    """``no_grad`` or autocast around a part of the block would need an op that switches them half way."""
    rows = [v for v in members if v.dtype is not None and v.dtype.is_floating_point and len(v.shape) >= 2]
    first = min(rows, key=lambda v: v.position)
    for value in rows:
        require(value.context == first.context, "grad mode or autocast changes inside the block", value)


def _require_live_inputs(region: MoERegion, members: set[Value]) -> None:
    """The rewritten block runs where the old output was; its inputs must still mean the same there."""
    through_view = any(u.op == "aliased_write" for u in region.output.users)
    require(not through_view, "the block's output is written through a view of it", region.output)
    gone = {v.position for v in members - escaping(members, region.output)}
    for value in (*region.inputs, *region.computed):
        overwritten = value.superseded is not None and value.superseded < region.output.position
        overwritten = overwritten or (value.superseded == region.output.position and value is not region.base)
        unharmed = not overwritten or value.superseded in gone
        require(unharmed, "an input of the block is overwritten before the block ends", value)
