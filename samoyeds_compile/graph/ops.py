"""Canonical op names: the many spellings of one operation in a Dynamo graph, folded into one.

A Dynamo graph holds whatever the model's author wrote: ``x.topk(2)``, ``torch.topk(x, 2)``, ``torch.ops.aten.topk``,
``x += y``, ``x.add_(y)``, ``x.float()``, ``x.to(torch.float32)``. `canonicalize` gives each call one name and named
arguments, so that a pattern is written once.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Writes = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Call:
    """A call in canonical form.

    Attributes:
        name: canonical op name, without namespace for ATen, ``namespace::name`` for other operator libraries.
        args: arguments by parameter name; those of an op without a known signature are named ``"0"``, ``"1"``, ...
        writes: the FX nodes that the call mutates.
    """

    name: str
    args: Mapping[str, Any]
    writes: Writes = ()


SIGNATURES: Mapping[str, tuple[str, ...]] = {
    name: tuple(parameters.split())
    for name, parameters in {
        "_grouped_mm": "input mat2 offs bias out_dtype",
        "transformers::grouped_mm_fallback": "input mat2 offs",
        "add": "input other alpha",
        "addmm": "input mat1 mat2",
        "amax": "input dim keepdim",
        "any": "input dim keepdim",
        "arange": "start end step",
        "argmax": "input dim keepdim",
        "argsort": "input dim descending stable",
        "baddbmm": "input batch1 batch2",
        "bincount": "input weights minlength",
        "bmm": "input mat2",
        "cat": "input dim",
        "matmul": "input mat2",
        "chunk": "input chunks dim",
        "clamp": "input min max",
        "clamp_max": "input max",
        "clamp_min": "input min",
        "cumsum": "input dim dtype",
        "div": "input other rounding_mode",
        "dropout": "input p training inplace",
        "embedding": "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
        "empty_like": "input",
        "zeros_like": "input",
        "floor_divide": "input other",
        "full": "size fill_value",
        "full_like": "input fill_value",
        "gather": "input dim index",
        "ge": "input other",
        "gelu": "input approximate",
        "getattr": "input name",
        "histc": "input bins min max",
        "index": "input indices",
        "index_add": "input dim index source",
        "index_put": "input indices values accumulate",
        "index_select": "input dim index",
        "linear": "input weight bias",
        "layer_norm": "input normalized_shape weight bias eps",
        "masked_fill": "input mask value",
        "max": "input dim keepdim",
        "mean": "input dim keepdim dtype",
        "mul": "input other",
        "new_full": "input size fill_value",
        "one_hot": "input num_classes",
        "bitwise_and": "input other",
        "bitwise_or": "input other",
        "logical_and": "input other",
        "logical_or": "input other",
        "pad": "input pad mode value",
        "type_as": "input other",
        "scatter": "input dim index src",
        "scatter_add": "input dim index src",
        "scatter_reduce": "input dim index src reduce include_self",
        "select": "input dim index",
        "stack": "input dim",
        "unbind": "input dim",
        "where": "input self other",
        "eq": "input other",
        "ne": "input other",
        "gt": "input other",
        "lt": "input other",
        "le": "input other",
        "remainder": "input other",
        "glu": "input dim",
        "index_copy": "input dim index source",
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
    "_softmax": "softmax",
    "type": "to",
    "negative": "neg",
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "and_": "bitwise_and",  # these functions of ``operator`` end in an underscore, and write to nothing
    "or_": "bitwise_or",
    "not_": "logical_not",
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "iand": "bitwise_and_",
    "ior": "bitwise_or_",
    "itruediv": "div_",
    "ifloordiv": "floor_divide_",
    "ipow": "pow_",
}

IN_PLACE_OPERATORS = frozenset("iconcat ilshift imatmul imod irshift ixor setitem delitem".split())
"""Functions of the `operator` module that write and have no canonical name of their own."""

ASSERTIONS = frozenset(("_assert_scalar", "_check", "sym_constrain_range", "sym_constrain_range_for_size"))
"""Statements on sizes that compute nothing."""

ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
ONES = frozenset(("ones", "ones_like", "new_ones"))

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
    writes = written_nodes(node, name)
    if _is_in_place(name) and "::" not in name:
        name = SYNONYMS.get(name[:-1], name[:-1])
    elif "out" in node.kwargs:
        name = f"{name}.out"
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


def written_nodes(node: fx.Node, name: str) -> tuple[fx.Node, ...]:
    """The tensors that a call writes to: by its schema where it has one, by PyTorch's naming rules otherwise."""
    written: list[Any] = [node.kwargs.get("out")]
    written += [node.args[i] if isinstance(i, int) else node.kwargs[i] for i in _written_by_schema(node)]
    if _is_in_place(name) or name in IN_PLACE_OPERATORS or _inplace_flag(node):
        written.append(node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self")))
    found: list[fx.Node] = []
    fx.map_arg(written, found.append)
    return tuple(dict.fromkeys(found))


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _written_by_schema(node: fx.Node) -> list[int | str]:
    """Positions and keywords of the arguments that a custom or ATen operator declares as written to."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        schemas = [target._schema]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, overload)._schema for overload in target.overloads()]
    else:
        return []
    written = [
        (i, a.name) for s in schemas for i, a in enumerate(s.arguments) if a.alias_info and a.alias_info.is_write
    ]
    positions: list[int | str] = [i for i, _ in written if i < len(node.args)]
    return positions + [name for _, name in written if name in node.kwargs]


def _inplace_flag(node: fx.Node) -> bool:
    """Whether ``inplace=True`` is passed, by keyword or by position, to a function of `torch.nn.functional`."""
    if node.kwargs.get("inplace") is True:
        return True
    position = _inplace_position(node.target) if node.op == "call_function" else None
    return position is not None and position < len(node.args) and node.args[position] is True


@functools.lru_cache(maxsize=512)
def _inplace_position(target: Any) -> int | None:
    if not isinstance(target, types.FunctionType):
        return None
    parameters = list(inspect.signature(target).parameters)
    return parameters.index("inplace") if "inplace" in parameters else None


def _normalize(node: fx.Node, name: str, writes: Writes) -> Call:
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
    renamed = {"self": "input", "axis": "dim", "tensors": "input", "condition": "input"}
    renamed |= {"split_size_or_sections": "split_size"}
    return bound | {renamed.get(k, k): v for k, v in kwargs.items()}


def _shape(node: fx.Node) -> tuple[Any, ...]:
    sizes = node.args[1:] or tuple(node.kwargs.get(k) for k in ("size", "shape", "dims") if k in node.kwargs)
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else tuple(sizes)


def _normalize_to(node: fx.Node, name: str, writes: Writes) -> Call:
    """``x.to(dtype)`` and its spellings; a move to another device keeps its own name."""
    arguments = [*node.args[1:], *node.kwargs.values()]
    dtypes = [a for a in arguments if isinstance(a, torch.dtype)]
    if len(dtypes) == 1 and not any(isinstance(a, (torch.device, str, fx.Node)) for a in arguments):
        return Call("to", {"input": node.args[0], "dtype": dtypes[0]}, writes)
    if len(arguments) == 1 and isinstance(arguments[0], fx.Node) and _is_tensor(arguments[0]):
        return Call("type_as", {"input": node.args[0], "other": arguments[0]}, writes)
    return Call("to_other", bind("to_other", node.args, node.kwargs), writes)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _normalize_getitem(node: fx.Node, name: str, writes: Writes) -> Call:
    container, key = node.args
    value = container.meta.get("example_value") if isinstance(container, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return Call("item", {"input": container, "key": key}, writes)
    if _is_unsqueeze(key):
        return Call("unsqueeze", {"input": container, "dim": _unsqueezed_dim(key)}, writes)
    if has_node(key):
        return Call("index", {"input": container, "indices": key if isinstance(key, tuple) else (key,)}, writes)
    return Call("slice", {"input": container, "key": key if isinstance(key, tuple) else (key,)}, writes)


def _is_unsqueeze(key: Any) -> bool:
    """``x[:, None]``: one new axis, everything else whole."""
    parts = key if isinstance(key, tuple) else (key,)
    others = [part for part in parts if part is not None]
    return len(parts) - len(others) == 1 and all(p is Ellipsis or p == slice(None) for p in others)


def _unsqueezed_dim(key: Any) -> int:
    parts = key if isinstance(key, tuple) else (key,)
    at = next(i for i, part in enumerate(parts) if part is None)
    return at - len(parts) if any(part is Ellipsis for part in parts[:at]) else at


def _normalize_index(node: fx.Node, name: str, writes: Writes) -> Call:
    """``aten.index(x, [i])`` and ``index_select(x, 0, i)`` are ``x[i]``."""
    args = bind(name, node.args, node.kwargs)
    if name == "index_select":
        if args.get("dim") != 0:
            return Call(name, args, writes)
        return Call("index", {"input": args["input"], "indices": (args["index"],)}, writes)
    whole = slice(None)  # aten writes an axis that is not indexed as None; in ``x[None]`` that is a new axis
    return Call("index", args | {"indices": tuple(whole if i is None else i for i in args["indices"])}, writes)


def _normalize_setitem(node: fx.Node, name: str, writes: Writes) -> Call:
    container, key, value = node.args
    args = {"input": container, "indices": key if isinstance(key, tuple) else (key,), "values": value}
    return Call("index_put", args, writes)


def _normalize_getattr(node: fx.Node, name: str, writes: Writes) -> Call:
    container, attribute = node.args
    if attribute == "mT":
        return Call("transpose", {"input": container, "dim0": -2, "dim1": -1}, writes)
    return Call("getattr", {"input": container, "name": attribute}, writes)


def _normalize_arange(node: fx.Node, name: str, writes: Writes) -> Call:
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


def has_node(argument: Any) -> bool:
    """Whether an argument holds an FX node that is a tensor, at any depth (a symbolic size in a slice is none)."""
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return any(isinstance(n.meta.get("example_value"), torch.Tensor) for n in found)
