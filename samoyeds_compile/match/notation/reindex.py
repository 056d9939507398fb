"""Ops that only move elements: element ``index`` of the result is element ``index'`` of the input.

Views, permutations, slices, gathers, repeats. Each rule answers with the input and its index, or None where the op does
more than that (`step` then leaves it to others). Booleans as indices count as their list of true entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from samoyeds_compile.graph.values import Value
from samoyeds_compile.match.notation.index import (
    ZERO,
    Index,
    Piece,
    Size,
    Start,
    add,
    constant,
    coordinate,
    divide,
    flatten,
    of_atom,
    part_sizes,
    remainder,
    scale,
    size_of,
    sizes_of,
    unflatten,
)

Place = tuple[Value, tuple[Index, ...]]
"""An element of a tensor."""


class Integers(Protocol):
    """What the rules need to know of integer tensors."""

    def integer(self, value: Value, index: tuple[Index, ...]) -> Index:
        """An element of an integer tensor."""

    def canon(self, value: Value) -> Value:
        """The first value that is computed like this one."""


Rule = Callable[[Value, tuple[Index, ...], Integers], Place | None]


def step(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    """The element of another tensor that ``value[index]`` is a copy of."""
    rule = _RULES.get(value.op)
    if rule is None or not (isinstance(value.input, Value) or value.op in ("stack", "cat")):
        return None
    return rule(value, index, integers)


def reshape_index(index: Sequence[Index], shape: Sequence[Size], source: Sequence[Size]) -> tuple[Index, ...]:
    """Index into a tensor of shape ``source`` of what stands at ``index`` after a reshape to ``shape``."""
    kept = [(i, n) for i, n in zip(index, shape, strict=True) if n != 1]
    wanted = [n for n in source if n != 1]
    head: list[Index] = []
    tail: list[Index] = []
    while kept and wanted and kept[-1][1] == wanted[-1]:
        tail.insert(0, kept.pop()[0])
        wanted.pop()
    while kept and wanted and kept[0][1] == wanted[0]:
        head.append(kept.pop(0)[0])
        wanted.pop(0)
    middle = unflatten(flatten([i for i, _ in kept], [n for _, n in kept]), wanted)
    found = iter([*head, *middle, *tail])
    return tuple(ZERO if n == 1 else next(found) for n in source)


def _reshape(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    return value.input, reshape_index(index, sizes_of(value), sizes_of(value.input))


def _same(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    return value.input, index


def _expand(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    return value.input, broadcast(index, value.input)


def broadcast(index: tuple[Index, ...], operand: Value) -> tuple[Index, ...]:
    """Index into an operand that is broadcast to the shape that ``index`` belongs to."""
    sizes = sizes_of(operand)
    own = index[len(index) - len(sizes) :]
    return tuple(ZERO if n == 1 else i for i, n in zip(own, sizes, strict=True))


def _permute(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    order = value.arg("shape") if value.op == "permute" else value.arg("dims")
    rank = len(index)
    source: list[Index] = [ZERO] * rank
    for position, axis in enumerate(order):
        source[axis % rank] = index[position]
    return value.input, tuple(source)


def _transpose(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    swapped = list(index)
    if value.op == "transpose":
        a, b = value.arg("dim0"), value.arg("dim1")
        swapped[a], swapped[b] = swapped[b], swapped[a]
        return value.input, tuple(swapped)
    return value.input, tuple(reversed(swapped))


def _attribute(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    if value.arg("name") in ("T", "H") and len(index) <= 2:
        return value.input, tuple(reversed(index))
    return (value.input, index) if value.arg("name") == "data" else None


def _slice(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    """``x[1, :, ::2, None, ...]``: numbers, slices, new axes."""
    source: list[Index] = []
    rest = list(index)
    if value.arg("key") is None:  # aten.slice, which names its axis
        return None
    key = _without_ellipsis(value.arg("key"), len(value.input.shape))
    for part in key:
        if part is None:
            rest.pop(0)
        elif isinstance(part, slice):
            source.append(_sliced(rest.pop(0), part, sizes_of(value.input)[len(source)]))
        elif isinstance(part, int):
            source.append(_position(part, value.input, len(source)))
        else:
            return None
    return value.input, tuple(source + rest)


def axis_summed(value: Value, index: tuple[Index, ...]) -> tuple[int, list[Index]] | None:
    """(the axis that a sum runs over, the index without it), for a sum over one axis of a tensor."""
    axes = value.arg("dim")
    axes = axes if isinstance(axes, tuple) else (axes,)
    if not isinstance(value.input, Value) or len(axes) != 1 or not isinstance(axes[0], int):
        return None
    axis = axes[0] % len(value.input.shape)
    return axis, [*index[:axis], *index[axis + 1 :]] if value.arg("keepdim", False) else list(index)


def _sliced(index: Index, part: slice, size: Size) -> Index:
    start, stride = part.start or 0, part.step or 1
    if isinstance(start, Value):
        start = size_of(start.example)
    if isinstance(start, int) and start < 0:
        start = start + size
    return add(scale(index, stride), constant(start))


def _without_ellipsis(key: tuple[Any, ...], rank: int) -> list[Any]:
    used = sum(1 for k in key if k is not None and k is not Ellipsis)
    missing = [slice(None)] * (rank - used)
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    return [*key[:at], *missing, *key[at + 1 :]]


def _select(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    axis, number = value.arg("dim", 0), value.arg("index")
    if not isinstance(number, int):
        return None
    axis %= len(value.input.shape)
    return value.input, (*index[:axis], _position(number, value.input, axis), *index[axis:])


def _position(number: int, source: Value, axis: int) -> Index:
    """A position along an axis, counted from its start."""
    return constant(number if number >= 0 else sizes_of(source)[axis] + number)


def _narrow(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    axis, start = value.arg("dim") % len(index), value.arg("start")
    if not isinstance(start, int):
        return None
    return value.input, _moved(index, axis, add(index[axis], constant(start)))


def _moved(index: tuple[Index, ...], axis: int, new: Index) -> tuple[Index, ...]:
    return (*index[:axis], new, *index[axis + 1 :])


def _item(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    """One of the results of chunk, split, unbind; the sorted values of a sort."""
    whole, number = value.input, value.arg("key")
    if not isinstance(number, int) or not isinstance(whole.input, Value):
        return None
    source = whole.input
    if whole.op == "unbind":
        axis = whole.arg("dim", 0) % len(source.shape)
        return source, (*index[:axis], _position(number, source, axis), *index[axis:])
    if whole.op in ("chunk", "split", "tensor_split"):
        return _piece(whole, number, index)
    return None


def _piece(whole: Value, number: int, index: tuple[Index, ...]) -> Place:
    source, axis = whole.input, whole.arg("dim", 0) % len(index)
    sizes = part_sizes(whole, axis)
    number %= len(sizes)
    if all(isinstance(n, int) for n in sizes):
        return source, _moved(index, axis, add(index[axis], constant(sum(sizes[:number]))))
    atom = index[axis].atom
    if isinstance(atom, Piece) and atom.number == number and part_sizes(atom.split, 0) == sizes:
        return source, _moved(index, axis, atom.index)
    return source, _moved(index, axis, add(index[axis], of_atom(Start(whole, number))))


def _index(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    """``x[i]``, ``x[:, i]``, ``x[None, i]``, ``x[i, j]``, ``x[mask]``."""
    parts = index_parts(value.input, value.arg("indices"))
    if parts is None:
        return None
    rank = indexed_rank(parts)
    advanced = [i for i, p in enumerate(parts) if _is_tensor(p) or isinstance(p, int)]
    adjacent = advanced == list(range(advanced[0], advanced[-1] + 1))
    before = sum(1 for p in parts[: advanced[0]] if p is None or isinstance(p, slice)) if adjacent else 0
    picked, others = index[before : before + rank], [*index[:before], *index[before + rank :]]
    source: list[Index] = []
    for part in parts:
        if part is None:
            others.pop(0)
        elif isinstance(part, slice):
            source.append(_sliced(others.pop(0), part, sizes_of(value.input)[len(source)]))
        elif isinstance(part, int):
            source.append(_position(part, value.input, len(source)))
        elif part.dtype == torch.bool:
            mask = integers.canon(part)
            source.extend(coordinate(mask, axis, picked[0]) for axis in range(len(part.shape)))
        else:
            source.append(integers.integer(part, broadcast(picked, part)))
    return value.input, tuple(source)


def index_parts(source: Value, indices: Any) -> list[Any] | None:
    """The parts of an index: one for each axis of the source (masks span several), and new axes; None if unknown."""
    key = tuple(indices)
    spans = sum(_span(p) for p in key)
    missing = [slice(None)] * (len(source.shape) - spans)
    at = next((i for i, k in enumerate(key) if k is Ellipsis), len(key))
    parts = [*key[:at], *missing, *key[at + 1 :]]
    known = all(p is None or isinstance(p, (slice, int)) or _is_tensor(p) for p in parts)
    masks = [p for p in parts if _is_tensor(p) and p.dtype == torch.bool]
    if not known or (masks and len([p for p in parts if _is_tensor(p) or isinstance(p, int)]) > 1):
        return None
    return parts if any(_is_tensor(p) for p in parts) else None


def _span(part: Any) -> int:
    """How many axes of the source a part of an index takes."""
    if part is None or part is Ellipsis:
        return 0
    return len(part.shape) if _is_tensor(part) and part.dtype == torch.bool else 1


def _is_tensor(part: Any) -> bool:
    return isinstance(part, Value) and part.is_tensor


def indexed_rank(parts: Sequence[Any]) -> int:
    """How many axes the indexing tensors have together after broadcasting."""
    ranks = [1 if p.dtype == torch.bool else len(p.shape) for p in parts if _is_tensor(p)]
    return max(ranks)


def _index_select(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    axis = value.arg("dim") % len(index)
    return value.input, _moved(index, axis, integers.integer(value.arg("index"), (index[axis],)))


def _embedding(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    """``F.embedding(ids, table)`` is ``table[ids]``, unless an option changes the table or its gradient."""
    ids, table = value.input, value.arg("weight")
    options = (value.arg("max_norm"), value.arg("scale_grad_by_freq"), value.arg("sparse"))
    if value.arg("padding_idx") is not None or any(options) or not isinstance(table, Value):
        return None
    return table, (integers.integer(ids, index[:-1]), index[-1])


def _gather(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    chosen = value.arg("index", value.arg("indices"))
    axis = value.arg("dim")
    if not isinstance(axis, int) or not isinstance(chosen, Value):
        return None
    axis %= len(index)
    place = index if value.op == "gather" else broadcast(index, chosen)
    moved = _moved(index, axis, integers.integer(chosen, place))
    return value.input, tuple(ZERO if n == 1 else i for i, n in zip(moved, sizes_of(value.input), strict=True))


def _repeat_interleave(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    repeats, axis = value.arg("repeats"), value.arg("dim")
    if not isinstance(repeats, int):
        return None
    if axis is None:
        return value.input, unflatten(divide(index[0], repeats), sizes_of(value.input))
    axis %= len(index)
    return value.input, _moved(index, axis, divide(index[axis], repeats))


def _repeat(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    sizes = sizes_of(value.input)
    own = index[len(index) - len(sizes) :]
    return value.input, tuple(ZERO if n == 1 else remainder(i, n) for i, n in zip(own, sizes, strict=True))


def _stack(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    axis = value.arg("dim", 0) % len(index)
    number = index[axis].number
    if number is None:
        return None
    return value.input[number], (*index[:axis], *index[axis + 1 :])


def _cat(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    """Where the position along the axis is a number, and so lies in a known part."""
    axis = value.arg("dim", 0) % len(index)
    number = index[axis].number
    alike = all(len(part.shape) == len(index) for part in value.input)  # ``cat`` takes ``tensor([])`` beside any rank
    for part in value.input if number is not None and alike else ():
        size = sizes_of(part)[axis]
        if not isinstance(size, int):
            return None
        if number < size:
            return part, _moved(index, axis, constant(number))
        number -= size
    return None


def _dropout(value: Value, index: tuple[Index, ...], integers: Integers) -> Place | None:
    return (value.input, index) if value.arg("p") == 0 or value.arg("training") is False else None


_RULES: Mapping[str, Rule] = {
    **dict.fromkeys("view reshape flatten unflatten squeeze unsqueeze ravel _unsafe_view".split(), _reshape),
    **dict.fromkeys(("contiguous", "clone", "detach", "alias"), _same),
    **dict.fromkeys(("view_as", "reshape_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "t"), _transpose),
    "permute": _permute,
    "getattr": _attribute,
    "slice": _slice,
    "select": _select,
    "narrow": _narrow,
    "item": _item,
    "index": _index,
    "index_select": _index_select,
    "embedding": _embedding,
    "gather": _gather,
    "take_along_dim": _gather,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
    "tile": _repeat,
    "dropout": _dropout,
    "stack": _stack,
    "cat": _cat,
}  # fmt: skip
