"""Canonical op names: the many spellings of one operation in a Dynamo graph, folded into one.

A Dynamo graph holds whatever the model's author wrote: ``x.topk(2)``, ``torch.topk(x, 2)``, ``torch.ops.aten.topk``,
``x += y``, ``x.add_(y)``, ``x.float()``, ``x.to(torch.float32)``. `canonicalize` gives each call one name and named
arguments, so that a pattern is written once.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Call:
    """A call in canonical form.

    Attributes:
        name: canonical op name, without namespace for ATen, ``namespace::name`` for other operator libraries.
        args: arguments by parameter name; those of an op without a known signature are named ``"0"``, ``"1"``, ...
        writes: the FX node that the call mutates, if any.
    """

    name: str
    args: Mapping[str, Any]
    writes: fx.Node | None = None


SIGNATURES: Mapping[str, tuple[str, ...]] = {
    name: tuple(parameters.split())
    for name, parameters in {
        "_grouped_mm": "input mat2 offs bias out_dtype",
        "transformers::grouped_mm_fallback": "input mat2 offs",
        "add": "input other alpha",
        "arange": "start end step",
        "argmax": "input dim keepdim",
        "argsort": "input dim descending stable",
        "bmm": "input mat2",
        "matmul": "input mat2",
        "chunk": "input chunks dim",
        "clamp": "input min max",
        "clamp_max": "input max",
        "clamp_min": "input min",
        "cumsum": "input dim dtype",
        "div": "input other rounding_mode",
        "dropout": "input p training inplace",
        "empty_like": "input",
        "zeros_like": "input",
        "floor_divide": "input other",
        "gather": "input dim index",
        "ge": "input other",
        "gelu": "input approximate",
        "getattr": "input name",
        "histc": "input bins min max",
        "index": "input indices",
        "index_put": "input indices values accumulate",
        "index_select": "input dim index",
        "layer_norm": "input normalized_shape weight bias eps",
        "masked_fill": "input mask value",
        "max": "input dim keepdim",
        "mean": "input dim keepdim dtype",
        "mul": "input other",
        "narrow": "input dim start length",
        "pow": "input exponent",
        "repeat_interleave": "input repeats dim",
        "rms_norm": "input normalized_shape weight eps",
        "softmax": "input dim dtype",
        "sort": "input dim descending stable",
        "split": "input split_size dim",
        "squeeze": "input dim",
        "sub": "input other alpha",
        "sum": "input dim keepdim dtype",
        "topk": "input k dim largest sorted",
        "transpose": "input dim0 dim1",
        "unsqueeze": "input dim",
    }.items()
}

SYNONYMS: Mapping[str, str] = {
    "clip": "clamp",
    "divide": "div",
    "true_divide": "div",
    "truediv": "div",
    "floordiv": "floor_divide",
    "greater_equal": "ge",
    "multiply": "mul",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "grouped_mm": "_grouped_mm",
    "matmul": "matmul",
    "_softmax": "softmax",
    "type": "to",
    "negative": "neg",
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "itruediv": "div_",
    "ifloordiv": "floor_divide_",
    "ipow": "pow_",
    "square_": "square_",
}

CASTS: Mapping[str, torch.dtype] = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}

VIEWS = frozenset(
    "chunk contiguous detach expand expand_as flatten getitem narrow permute reshape select slice split squeeze to "
    "transpose type_as unbind unflatten unsqueeze view view_as".split()
)
"""Ops whose result may share storage with their first argument; what is written there shows through."""

_SHAPED = frozenset("view reshape expand repeat permute".split())


def canonicalize(node: fx.Node) -> Call | None:
    """The canonical form of a ``call_function`` or ``call_method`` node, None for anything else."""
    name = _spelled_name(node)
    if name is None:
        return None
    name = SYNONYMS.get(name, name)
    writes = None
    if _is_in_place(name):
        name, writes = SYNONYMS.get(name[:-1], name[:-1]), _first_node(node)
    elif node.kwargs.get("inplace") is True:
        writes = _first_node(node)
    elif isinstance(node.kwargs.get("out"), fx.Node):
        name, writes = f"{name}.out", _node_or_none(node.kwargs["out"])
    return _normalize(node, name, writes)


def _spelled_name(node: fx.Node) -> str | None:
    target = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return None
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
        namespace, _, name = packet._qualified_op_name.partition("::")
        return name if namespace == "aten" else f"{namespace}::{name}"
    return getattr(target, "__name__", str(target))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_") and "::" not in name


def _first_node(node: fx.Node) -> fx.Node | None:
    return _node_or_none(node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self")))


def _node_or_none(argument: object) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _normalize(node: fx.Node, name: str, writes: fx.Node | None) -> Call:
    if name in CASTS and node.op == "call_method":
        return Call("to", {"input": node.args[0], "dtype": CASTS[name]}, writes)
    if name in _NORMALIZERS:
        return _NORMALIZERS[name](node, name, writes)
    if name in _SHAPED:
        return Call(name, {"input": node.args[0], "shape": _shape(node)}, writes)
    return Call(name, bind(name, node.args, node.kwargs), writes)


def bind(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name; ``self`` is ``input`` and ``axis`` is ``dim``, as `torch` has it both ways."""
    parameters = SIGNATURES.get(name, ())
    bound = {parameters[i] if i < len(parameters) else ("input" if i == 0 else str(i)): a for i, a in enumerate(args)}
    renamed = {"self": "input", "axis": "dim"}
    return bound | {renamed.get(k, k): v for k, v in kwargs.items()}


def _shape(node: fx.Node) -> tuple[Any, ...]:
    sizes = node.args[1:] or tuple(node.kwargs.get(k) for k in ("size", "shape", "dims") if k in node.kwargs)
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else tuple(sizes)


def _normalize_to(node: fx.Node, name: str, writes: fx.Node | None) -> Call:
    """``x.to(dtype)`` and its spellings; a move to another device keeps its own name."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    dtypes = [a for a in arguments if isinstance(a, torch.dtype)]
    if len(dtypes) == 1 and not any(isinstance(a, (torch.device, str, fx.Node)) for a in arguments):
        return Call("to", {"input": node.args[0], "dtype": dtypes[0]}, writes)
    return Call("to_other", bind("to_other", node.args, node.kwargs), writes)


def _normalize_getitem(node: fx.Node, name: str, writes: fx.Node | None) -> Call:
    container, key = node.args
    value = container.meta.get("example_value") if isinstance(container, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return Call("item", {"input": container, "key": key}, writes)
    if has_node(key):
        return Call("index", {"input": container, "indices": key if isinstance(key, tuple) else (key,)}, writes)
    return Call("slice", {"input": container, "key": key if isinstance(key, tuple) else (key,)}, writes)


def _normalize_index(node: fx.Node, name: str, writes: fx.Node | None) -> Call:
    """``aten.index(x, [i])`` and ``index_select(x, 0, i)`` are ``x[i]``."""
    args = bind(name, node.args, node.kwargs)
    if name == "index_select":
        if args.get("dim") != 0:
            return Call(name, args, writes)
        return Call("index", {"input": args["input"], "indices": (args["index"],)}, writes)
    return Call("index", args | {"indices": tuple(args["indices"])}, writes)


def _normalize_setitem(node: fx.Node, name: str, writes: fx.Node | None) -> Call:
    container, key, value = node.args
    args = {"input": container, "indices": key if isinstance(key, tuple) else (key,), "values": value}
    return Call("index_put", args, container if isinstance(container, fx.Node) else None)


def _normalize_getattr(node: fx.Node, name: str, writes: fx.Node | None) -> Call:
    container, attribute = node.args
    if attribute == "mT":
        return Call("transpose", {"input": container, "dim0": -2, "dim1": -1}, writes)
    return Call("getattr", {"input": container, "name": attribute}, writes)


def _normalize_arange(node: fx.Node, name: str, writes: fx.Node | None) -> Call:
    """``arange(end)`` and ``arange(start, end)`` share a name but not their first parameter."""
    args = (0, *node.args) if len(node.args) == 1 else node.args
    return Call("arange", {"start": 0} | bind("arange", args, node.kwargs), writes)


_NORMALIZERS = {
    "arange": _normalize_arange,
    "getattr": _normalize_getattr,
    "getitem": _normalize_getitem,
    "index": _normalize_index,
    "index_select": _normalize_index,
    "setitem": _normalize_setitem,
    "to": _normalize_to,
}

assert operator.setitem.__name__ == "setitem"  # the names above are those of the `operator` module


def has_node(argument: Any) -> bool:
    """Whether an argument holds an FX node that is a tensor, at any depth (a symbolic size in a slice is none)."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return any(isinstance(n.meta.get("example_value"), torch.Tensor) for n in found)
