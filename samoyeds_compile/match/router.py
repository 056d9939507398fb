"""Name the router in front of a block, for the report; the rewrite leaves it as it is.

The routing stays outside the canonical op, so nothing depends on a right answer here: an unknown router is ``opaque``.
"""

from __future__ import annotations

from samoyeds_compile.graph.values import Value

_SCORES = ("softmax", "sigmoid", "softplus")
MAX_ANCESTORS = 400
"""How many values to look at behind the expert ids; the longest router in transformers has under 60."""


def name_router(expert_ids: Value, expert_weights: Value) -> str:
    """What kind of router produced the ids: ``softmax-topk``, ``topk-softmax``, ``sigmoid-grouped``, ``hash``, ..."""
    choice = _first(expert_ids, ("topk", "argmax", "max", "argsort", "sort", "index", "gather"))
    if choice is None:
        return "opaque"
    if choice.op in ("index", "gather"):
        return "hash" if not choice.dtype or not choice.dtype.is_floating_point else "opaque"
    before = _ops_behind(choice)
    scores = next((s for s in _SCORES if s in before), None)
    if scores is None:
        after = {expert_weights.op} | _ops_behind(expert_weights, stop=choice)
        late = next((s for s in _SCORES if s in after), None)
        return f"{_choice_name(choice)}-{late}" if late else _choice_name(choice)
    grouped = "topk" in before and "masked_fill" in before
    return f"{scores}-grouped" if grouped else f"{scores}-{_choice_name(choice)}"


def _choice_name(choice: Value) -> str:
    return {"topk": "topk", "argsort": "topk", "sort": "topk"}.get(choice.op, "argmax")


def _first(value: Value, ops: tuple[str, ...]) -> Value | None:
    """The nearest value behind ``value``, itself included, computed by one of ``ops``."""
    queue, seen = [value], {value}
    while queue and len(seen) < MAX_ANCESTORS:
        current = queue.pop(0)
        if current.op in ops:
            return current
        fresh = [o for o in current.operands if o not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return None


def _ops_behind(value: Value, stop: Value | None = None) -> set[str]:
    """Op names among the ancestors of ``value``, up to the router's own matrix product."""
    ops: set[str] = set()
    queue, seen = list(value.operands), {value, stop}
    while queue and len(seen) < MAX_ANCESTORS:
        current = queue.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op in ("linear", "mm", "matmul", "addmm", "placeholder"):
            continue
        ops.add(current.op)
        queue.extend(current.operands)
    return ops
