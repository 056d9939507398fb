"""A Dynamo graph of many equal layers out of the trace of one, for sizes that Dynamo itself takes too long to trace.

Every node of the layer is copied once for each layer, the output of one copy feeding the next. Nothing recorded on a
node is shared between copies: each has parameters of its own, and its calls are run again on fake tensors under the
trace's `FakeTensorMode`, so that storages are its own and every size that depends on data is a fresh symbol. To the
reader and the matcher the copy is what Dynamo would have made; `described` states in which sense, for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

from samoyeds_compile.graph.edit import run_node
from samoyeds_compile.graph.values import Value, ValueGraph
from samoyeds_compile.match.region import MoERegion


class Replica:
    """``layers`` copies of a traced layer, chained.

    Args:
        layer: Dynamo's graph of one layer with one input that is no parameter, and one output of the input's shape.
    """

    def __init__(self, layer: fx.GraphModule) -> None:
        self.layer = layer
        self.given = [n for n in layer.graph.nodes if n.op == "placeholder"]
        self.mode = detect_fake_mode([n.meta["example_value"] for n in self.given])
        (self.input,) = (n for n in self.given if not isinstance(n.meta["example_value"], nn.Parameter))
        self.calls = [n for n in layer.graph.nodes if n.op not in ("placeholder", "output")]
        (self.result,) = next(n for n in layer.graph.nodes if n.op == "output").args[0]

    def graph(self, layers: int) -> fx.GraphModule:
        """The graph of all layers; its fake tensors have no autograd history, as a trace in no_grad has none."""
        graph = fx.Graph()
        copies = self._placeholders(graph, layers)
        result: fx.Node | None = None
        with self.mode, torch.no_grad():
            for copied in copies:
                if result is not None:
                    copied[self.input] = result
                for node in self.calls:
                    copied[node] = self._call(graph, node, copied)
                result = copied[self.result]
        graph.output((result,))
        return fx.GraphModule(self.layer, graph)

    def _placeholders(self, graph: fx.Graph, layers: int) -> list[dict[fx.Node, fx.Node]]:
        """All at the start of the graph, as Dynamo has them: for each copy its own parameters, the input once."""
        copies: list[dict[fx.Node, fx.Node]] = [{} for _ in range(layers)]
        for number, copied in enumerate(copies):
            for node in self.given:
                if node is self.input and number:
                    continue
                new = copied[node] = graph.placeholder(f"{node.target}layer_{number}_")
                new.meta = dict(node.meta)
                with self.mode:
                    new.meta["example_value"] = _anew(node.meta["example_value"])
        return copies

    def _call(self, graph: fx.Graph, node: fx.Node, copied: Mapping[fx.Node, fx.Node]) -> fx.Node:
        new = graph.node_copy(node, copied.__getitem__)
        args, kwargs = fx.map_arg((new.args, new.kwargs), lambda n: n.meta["example_value"])
        if node.meta["example_value"] is None:  # an assertion: nothing to record
            return new
        example = run_node(new, args, kwargs)
        new.meta["example_value"] = example
        bindings = compute_unbacked_bindings(self.mode.shape_env, example)
        if bindings:
            new.meta["unbacked_bindings"] = bindings
        return new


def _anew(example: Tensor) -> Tensor:
    """A fake tensor or parameter like this one, with a storage of its own."""
    tensor = torch.empty_like(example)
    if isinstance(example, nn.Parameter):
        return nn.Parameter(tensor, requires_grad=example.requires_grad)
    return tensor.requires_grad_(example.requires_grad)


def described(graph: ValueGraph, regions: Sequence[MoERegion]) -> list[Any]:
    """What reading and matching said of a graph, so that two graphs can be compared.

    Values stand as their numbers in the order of the graph, symbols as theirs in the order of appearance. Of each
    value: op, arguments (but the message of an assertion, which has names in it), readers, writes, recorded result; of
    each region: what it computes, its operands and its members.
    """
    plain = _Plain(graph)
    values = [
        (v.op, plain({} if v.op == "_assert_scalar" else v.args), plain(v.operands), plain(v.users),
         v.writes_input, v.superseded, plain(v.example))
        for v in graph.values
    ]  # fmt: skip
    found = [
        (r.family, r.top_k, r.activation, r.gate_up_layout, r.num_experts, plain(r.output), plain(r.inputs),
         plain(r.members), plain([(p.weights, p.bias, p.transposed) for p in r.projections]))
        for r in regions
    ]  # fmt: skip
    return [*values, *found]


class _Plain:
    """Makes of an argument something that compares equal to its like in another graph."""

    def __init__(self, graph: ValueGraph) -> None:
        self.places = {value: place for place, value in enumerate(graph.values)}
        self.symbols: dict[Any, sympy.Symbol] = {}

    def __call__(self, item: Any) -> Any:
        if isinstance(item, Value):
            return ("value", self.places[item])
        if isinstance(item, (torch.SymInt, torch.SymBool)):
            expression = item.node.expr
            for symbol in sorted(expression.free_symbols, key=str):
                self.symbols.setdefault(symbol, sympy.Symbol(f"size{len(self.symbols)}"))
            return str(expression.xreplace(self.symbols))
        if isinstance(item, Tensor):
            return (type(item), item.dtype, self(tuple(item.shape)), self(item.stride()))
        if isinstance(item, dict):
            return {key: self(value) for key, value in item.items()}
        return tuple(map(self, item)) if isinstance(item, (tuple, list)) else item
