"""Which numbers in a call are sizes: those that change when the same code runs on tensors of other sizes.

A size is told by where it stands (an argument of ``view``, the end of ``arange``, an edge of a slice), never by its
value. Dimension numbers, positions (``x[3]``), scalars and repeat counts of ``repeat_interleave`` are no sizes. A
divisor of integers (``order % T``) may be one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Size:
    """A number in a call that is a size. Equal sizes (same number, same place) mean the same dimension.

    Attributes:
        number: what stands there.
        place: op and argument, and what tells it from other calls of the op.
        prefers: what the place suggests it counts: ``tokens``, ``features`` (``hidden`` or ``width``) or ``plain``.
        symbolic: Dynamo keeps it as a symbol, so it counts tokens or nothing that is known here.
    """

    number: int
    place: str
    prefers: str
    symbolic: bool = False


_SHAPES: Mapping[str, int] = {
    "view": 1, "reshape": 1, "expand": 1, "repeat": 1, "tile": 1, "broadcast_to": 1, "_unsafe_view": 1,
    "new_zeros": 1, "new_ones": 1, "new_empty": 1, "zeros": 0, "ones": 0, "empty": 0, "rand": 0, "randn": 0,
}  # fmt: skip
"""Ops that take a shape, as one argument or as many, from this position on."""

_ARGUMENTS: Mapping[str, tuple[int, int, str]] = {
    "full": (0, 1, ""), "new_full": (1, 2, ""), "unflatten": (2, 3, ""),
    "layer_norm": (1, 2, "features"), "rms_norm": (1, 2, "features"),
    "arange": (0, 2, "tokens"), "slice": (2, 4, "tokens"), "repeat_interleave": (9, 9, "tokens"),
    "split": (1, 2, "features"), "split_with_sizes": (1, 2, "features"), "narrow": (2, 4, "features"),
    "floordiv": (1, 2, "plain"), "floor_divide": (1, 2, "plain"), "mod": (1, 2, "plain"), "remainder": (1, 2, "plain"),
}  # fmt: skip
"""Ops with sizes among their arguments: first position, the one after the last, and what they prefer to count."""

_KEYWORDS = frozenset(
    "size shape sizes start end length split_size split_size_or_sections split_sizes normalized_shape "
    "output_size other".split()
)


def call_name(node: fx.Node) -> str:
    """Name of the method or function that a node calls, without namespace and overload."""
    return function_name(node.target)


def function_name(target: Any) -> str:
    """``view`` of ``torch.Tensor.view``, ``"view"`` and ``torch.ops.aten.view.default``."""
    return str(target if isinstance(target, str) else getattr(target, "__name__", target)).split(".")[0]


def mark_sizes(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], where: str
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, every size among them a `Size`.

    Args:
        name: of what is called.
        args: its arguments; what is a `Size` already stays as it is.
        kwargs: more of them.
        where: tells the call from others, so that the same number may mean something else there.
    """

    def place(size: Size) -> Size:
        return size if size.symbolic else replace(size, place=f"{size.place} {where}")

    marked: tuple[list[Any], dict[str, Any]] = replace_leaves(_mark_call(name, args, kwargs), Size, place)
    return marked


def _mark_call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    if name in ("getitem", "setitem"):
        return [args[0], _mark_key(args[1], name), *args[2:]], dict(kwargs)
    if name in _SHAPES:
        first = _SHAPES[name]
        shape = args[first:]
        spread = not (len(shape) == 1 and isinstance(shape[0], (tuple, list)))
        marked = _mark_shape(shape if spread else shape[0], name)
        return [*args[:first], *(marked if spread else [marked])], _mark_keywords(name, kwargs, "")
    if name in _ARGUMENTS:
        first, stop, prefers = _ARGUMENTS[name]
        new = [_mark(a, f"{name}.{i}", prefers) if first <= i < stop else a for i, a in enumerate(args)]
        return new, _mark_keywords(name, kwargs, prefers)
    return list(args), dict(kwargs)


def _mark_keywords(name: str, kwargs: Mapping[str, Any], prefers: str) -> dict[str, Any]:
    return {k: _mark(v, f"{name}.{k}", prefers) if k in _KEYWORDS else v for k, v in kwargs.items()}


def _mark(argument: Any, place: str, prefers: str) -> Any:
    if isinstance(argument, (tuple, list)):
        if not prefers:
            return _mark_shape(argument, place)
        return type(argument)(_mark(a, f"{place}.{i}", prefers) for i, a in enumerate(argument))
    return _size(argument, place, prefers or "tokens")


def _mark_shape(shape: Sequence[Any], place: str) -> list[Any]:
    """Of a shape the first number likely counts tokens and the last one features."""
    last = len(shape) - 1
    prefers = ["tokens" if i == 0 else "features" if i == last else "plain" for i in range(len(shape))]
    return [_size(a, f"{place}.{i}.{last}", p) for i, (a, p) in enumerate(zip(shape, prefers, strict=True))]


def _mark_key(key: Any, place: str) -> Any:
    if not isinstance(key, tuple):
        return _mark_edges(key, f"{place}.0", "tokens")
    last = len(key) - 1
    return tuple(
        _mark_edges(k, f"{place}.{i}", "features" if i == last and last else "tokens") for i, k in enumerate(key)
    )


def _mark_edges(key: Any, place: str, prefers: str) -> Any:
    if not isinstance(key, slice):
        return key
    return slice(_size(key.start, f"{place}.start", prefers), _size(key.stop, f"{place}.stop", prefers), key.step)


def _size(argument: Any, place: str, prefers: str) -> Any:
    """A positive number as a size; -1, 0, nodes and what is already a size as they are."""
    is_size = isinstance(argument, int) and not isinstance(argument, bool) and argument > 0
    return Size(argument, place, prefers) if is_size else argument


def replace_leaves(argument: Any, kind: type | tuple[type, ...], new: Any) -> Any:
    """``argument`` with every instance of ``kind`` in it replaced by ``new(instance)``."""
    if isinstance(argument, kind):
        return new(argument)
    if isinstance(argument, tuple):
        return tuple([replace_leaves(a, kind, new) for a in argument])
    if isinstance(argument, list):
        return [replace_leaves(a, kind, new) for a in argument]
    if isinstance(argument, dict):
        return {k: replace_leaves(v, kind, new) for k, v in argument.items()}
    if isinstance(argument, slice):
        return slice(*(replace_leaves(a, kind, new) for a in (argument.start, argument.stop, argument.step)))
    return argument
