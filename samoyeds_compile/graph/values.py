"""A functional view of an FX graph: what each node *means*, with mutation resolved.

A Dynamo graph is no pure data flow: after ``out.add_(bias)`` later nodes go on reading ``out`` and mean the sum. Here
every write makes a new `Value` and every later read of the written tensor reads that one. A tensor that shares storage
with a written one reads as an opaque ``aliased_write``, so a pattern that would have to reason about it declines
instead of guessing. It is made where such a tensor is read, so that the view of a loop of writes, each of which returns
the tensor under another name, grows linearly. The view only reads; the graph is untouched.
"""

from __future__ import annotations

import bisect
import contextlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from samoyeds_compile.graph.ops import VIEWS, canonicalize


@dataclass(frozen=True)
class Context:
    """What surrounds a value: arguments of the open autocast contexts, outermost first, and grad mode.

    Both as far as the graph itself sets them; what was on when it was captured holds besides.
    """

    autocast: tuple[tuple[Any, ...], ...] = ()
    grad: bool = True

    def after(self, node: fx.Node) -> Context:
        """The context behind ``node``."""
        if node.target is torch.amp.autocast_mode._enter_autocast:
            return replace(self, autocast=(*self.autocast, tuple(node.args)))
        if node.target is torch.amp.autocast_mode._exit_autocast:
            return replace(self, autocast=self.autocast[:-1])
        if node.target is torch._C._set_grad_enabled:
            return replace(self, grad=bool(node.args[0]))
        return self


def _expression(size: Any) -> Any:
    """A size as a number or a sympy expression; adds no guard."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


class KnownSizes:
    """Equations between sizes that depend on data: the parts of a split are together as long as what was split.

    Attributes:
        parts: sizes of the parts of a split along an axis, as far as they were asked for.
    """

    def __init__(self) -> None:
        self._replacements: dict[Any, Any] = {}
        self.parts: dict[tuple[fx.Node, int], list[Any]] = {}

    def learn(self, whole: torch.Tensor, parts: tuple[torch.Tensor, ...], dim: int) -> None:
        """``parts`` are ``whole`` split along ``dim``."""
        sizes = [_expression(p.shape[dim]) for p in parts]
        last, total = sizes[-1], _expression(whole.shape[dim])
        if len(sizes) > 1 and getattr(last, "is_Symbol", False) and last not in sympy.sympify(total).free_symbols:
            self._replacements[last] = total - sum(sizes[:-1])

    def apply(self, size: torch.SymInt) -> Any:
        """The size as an expression in which what is known is used."""
        expression = size.node.expr
        if not any(symbol in self._replacements for symbol in expression.free_symbols):
            return expression
        return sympy.expand(expression.xreplace(self._replacements))  # a sum of sizes; simplify() takes far longer


@dataclass(eq=False)
class Value:
    """What one node computes at one point of the graph.

    Attributes:
        op: canonical op name; ``placeholder``, ``output``, ``aliased_write`` and FX's own op kinds for the rest.
        node: the FX node that computes it.
        holder: the FX node to read it from: for a write the tensor written to (``t[i] = v`` itself returns nothing).
        args: arguments by name, nodes replaced by the values they stand for at that point.
        position: index in the graph's order.
        context: autocast and grad mode at that point.
        reads: what each FX node among the arguments stood for at that point.
        users: the values that read this one.
        writes_input: the write lands in storage that the graph does not own, so it is a side effect.
        superseded: position of the write after which the node means another value, if there is one.
        known: what is known of the sizes in the graph.
    """

    op: str
    node: fx.Node
    args: dict[str, Any]
    position: int
    holder: fx.Node
    context: Context = Context()
    reads: dict[fx.Node, Value] = field(default_factory=dict)
    users: list[Value] = field(default_factory=list)
    writes_input: bool = False
    superseded: int | None = None
    known: KnownSizes = field(default_factory=KnownSizes)

    def __repr__(self) -> str:
        return f"%{self.node.name}:{self.op}"

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument called ``name``, or ``default`` where the call leaves it out."""
        return self.args.get(name, default)

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.args.get("input")

    @property
    def example(self) -> Any:
        """The fake tensor (or number, or tuple) that Dynamo recorded for the node."""
        return self.holder.meta.get("example_value")

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of a tensor value, ints or SymInts; empty for what is no tensor."""
        return tuple(self.example.shape) if isinstance(self.example, torch.Tensor) else ()

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of a tensor value."""
        return self.example.dtype if isinstance(self.example, torch.Tensor) else None

    @property
    def is_tensor(self) -> bool:
        """Whether the value is a tensor or a tuple of tensors, and no size."""
        first = self.example[0] if isinstance(self.example, (tuple, list)) and self.example else self.example
        return isinstance(first, torch.Tensor)

    @property
    def operands(self) -> list[Value]:
        """Every value among the arguments, in order."""
        return list(_values_in(list(self.args.values())))


@dataclass
class ValueGraph:
    """The values of one GraphModule, in order; `of` gives the value a node computes."""

    module: fx.GraphModule
    values: list[Value]
    of: dict[fx.Node, Value]

    def with_op(self, *names: str) -> list[Value]:
        """All values computed by one of the named ops."""
        return [v for v in self.values if v.op in names]


def hint(size: Any) -> Any:
    """The number that a symbolic size or float had when the graph was captured."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def read_values(module: fx.GraphModule) -> ValueGraph:
    """Build the functional view of one GraphModule."""
    return _Reader(module).read()


def graph_modules(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The module and every nested one (checkpoint bodies, nested compile regions), each once."""
    return [m for m in module.modules() if isinstance(m, fx.GraphModule)]


def read_graphs(module: fx.GraphModule) -> list[ValueGraph]:
    """The views of the module and of every nested one."""
    return [read_values(m) for m in graph_modules(module)]


class _Reader:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.now: dict[fx.Node, Value] = {}  # what each node meant when it was last computed, written or read
        self.since: dict[fx.Node, int] = {}  # the position at which it began to mean that
        self.storages: dict[fx.Node, frozenset[Hashable]] = {}
        self.writes: dict[Hashable, list[Value]] = defaultdict(list)  # by the storage written to, in order
        self.owned_elsewhere: set[Hashable] = set()  # storages of the graph's inputs
        self.values: list[Value] = []
        self.meanings: list[tuple[Value, fx.Node]] = []  # every value with every node that meant it
        self.context = Context()
        self.known = KnownSizes()

    def read(self) -> ValueGraph:
        of = {}
        for node in self.module.graph.nodes:
            of[node] = self._read_node(node)
        for value in self.values:
            for operand in value.operands:
                operand.users.append(value)
        for value, node in self.meanings:
            write = next(iter(self._writes_after(value.position, node, most=1)), None)
            if write is not None and (value.superseded is None or write.position < value.superseded):
                value.superseded = write.position
        return ValueGraph(self.module, self.values, of)

    def _read_node(self, node: fx.Node) -> Value:
        call = canonicalize(node)
        name, args, writes = (call.name, dict(call.args), call.writes) if call else (node.op, _raw_args(node), ())
        if isinstance(node.target, torch._ops.HigherOrderOperator) and _body_writes(node):
            writes = tuple(n for n in node.all_input_nodes if isinstance(n.meta.get("example_value"), torch.Tensor))
        self.context = self.context.after(node)
        holder = writes[0] if len(writes) == 1 else node
        reads = {n: self._meaning(n) for n in node.all_input_nodes}
        value = Value(
            name, node, _resolve(args, reads), len(self.values), holder, self.context, reads, known=self.known
        )
        self.values.append(value)
        self._learn(value)
        self._share(node, value)
        self._mean(node, value)
        if writes:
            self._write(writes, value)
        return value

    def _learn(self, value: Value) -> None:
        if value.op == "split" and isinstance(value.input, Value) and isinstance(value.example, tuple):
            self.known.learn(value.input.example, value.example, value.arg("dim", 0))

    def _mean(self, node: fx.Node, value: Value) -> None:
        """From here on ``node`` means ``value``."""
        self.now[node], self.since[node] = value, value.position
        self.meanings.append((value, node))

    def _share(self, node: fx.Node, value: Value) -> None:
        keys = _storages_of(node)
        by_name = value.op == "unfold" or (not keys and value.op in VIEWS)  # no storage, or a fake one of its own
        if by_name and isinstance(value.input, Value):
            keys |= self.storages[value.input.holder]
        self.storages[node] = keys or frozenset((node,))
        if node.op in ("placeholder", "get_attr"):
            self.owned_elsewhere |= self.storages[node]

    def _write(self, targets: tuple[fx.Node, ...], value: Value) -> None:
        """From here on a target means ``value``; other nodes that share its storage mean something unknown."""
        keys = frozenset[Hashable]().union(*(self.storages[t] for t in targets))
        value.writes_input = not keys.isdisjoint(self.owned_elsewhere)
        for key in keys:
            self.writes[key].append(value)
        if len(targets) == 1:
            self._mean(targets[0], value)

    def _writes_after(self, position: int, node: fx.Node, most: int | None = None) -> list[Value]:
        """The writes to a node's storages that came after a position, in order; of each storage ``most``."""
        found: dict[Value, None] = {}
        for key in self.storages[node]:
            writes = self.writes.get(key, ())
            first = bisect.bisect_right(writes, position, key=_position)
            found.update(dict.fromkeys(writes[first : first + most if most else None]))
        return sorted(found, key=_position)

    def _meaning(self, node: fx.Node) -> Value:
        """What a node means at the point reached."""
        writes = self._writes_after(self.since[node], node)
        if writes:
            args = {"input": self.now[node], "writes": tuple(writes)}
            alias = Value("aliased_write", node, args, len(self.values), node, known=self.known)
            alias.writes_input = any(w.writes_input for w in writes)
            self.values.append(alias)
            self._mean(node, alias)
        return self.now[node]


def _position(value: Value) -> int:
    return value.position


def _resolve(argument: Any, reads: Mapping[fx.Node, Value]) -> Any:
    """An argument with every node replaced by what it means."""
    if isinstance(argument, fx.Node):
        return reads[argument]
    if isinstance(argument, dict):
        return {k: _resolve(v, reads) for k, v in argument.items()}
    if isinstance(argument, (tuple, list)):
        return tuple(_resolve(a, reads) for a in argument)
    if isinstance(argument, slice):
        return slice(*(_resolve(a, reads) for a in (argument.start, argument.stop, argument.step)))
    return argument


def _storages_of(node: fx.Node) -> frozenset[Hashable]:
    """Identities of the storages behind a node's tensors: views share theirs, and Dynamo's fake tensors keep that."""
    found: set[Hashable] = set()
    for leaf in torch.utils._pytree.tree_leaves(node.meta.get("example_value")):
        if isinstance(leaf, torch.Tensor):
            with contextlib.suppress(NotImplementedError, RuntimeError):  # a subclass may have no storage
                found.add(leaf.untyped_storage()._cdata)
    return frozenset(found)


def _body_writes(node: fx.Node) -> bool:
    """Whether a body of a higher-order op (a checkpointed layer) writes to what it is given."""
    owner = node.graph.owning_module
    attributes = [n.target for n in node.all_input_nodes if n.op == "get_attr"]
    bodies = [getattr(owner, str(name), None) for name in attributes]
    return any(v.writes_input for b in bodies if isinstance(b, fx.GraphModule) for v in read_values(b).values)


def _raw_args(node: fx.Node) -> dict[str, Any]:
    return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)


def _values_in(argument: Any) -> Iterator[Value]:
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _values_in(item)
    elif isinstance(argument, dict):
        yield from _values_in(list(argument.values()))
    elif isinstance(argument, slice):
        yield from _values_in([argument.start, argument.stop, argument.step])
