"""Cut a region out of a graph as a straight-line program that runs at sizes of one's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from samoyeds_compile.graph.edit import run_node
from samoyeds_compile.graph.ops import ASSERTIONS
from samoyeds_compile.graph.sizes import Size, call_name, mark_sizes, replace_leaves
from samoyeds_compile.graph.values import Value, hint

NumberOf = Callable[[Size], int]
_LEFT_OUT = ASSERTIONS | {"aliased_write"}


@dataclass(frozen=True)
class Ref:
    """An argument that is an input (its index) or the result of a step (number of inputs + its index)."""

    index: int


@dataclass
class Step:
    """One call.

    Attributes:
        value: what it computes in the graph.
        args, kwargs: arguments, in terms of `Ref` and `Size`.
        shape: of its result in the graph, None where unknown.
    """

    value: Value
    args: list[Any]
    kwargs: dict[str, Any]
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        return f"{self.value.node.op} {self.value.node.target} {self.args} {self.kwargs}"


class StepFailed(Exception):
    """A step raised, or gave something that cannot be right; ``step`` is its index."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(problem)
        self.step = step


class Fragment:
    """The members of a region as a program: ``inputs`` in, ``output`` out.

    Attributes:
        inputs: the values that the program is given, in order.
        steps: the members in graph order, and what computes sizes from them.
        output: where the result is.
        sizes: every distinct size, with the index of the first step that has it; in order of that index.
    """

    def __init__(self, inputs: Sequence[Value], steps: Sequence[Step], output: Ref) -> None:
        self.inputs, self.steps, self.output = list(inputs), list(steps), output
        self.sizes: dict[Size, int] = {}
        for index, step in enumerate(steps):
            replace_leaves((step.args, step.kwargs), Size, lambda s, i=index: self.sizes.setdefault(s, i))

    def run(
        self, inputs: Sequence[Any], number_of: NumberOf, accepts: Callable[[Step, Any], bool] = lambda *_: True
    ) -> Any:
        """Run the program.

        Args:
            inputs: one for each of the fragment's.
            number_of: the number to put in place of each size.
            accepts: whether a step's result is one that it may have.

        Raises:
            StepFailed: a step raised, or its result was not accepted.
        """
        results: list[Any] = list(inputs)

        def real(argument: Any) -> Any:
            return results[argument.index] if isinstance(argument, Ref) else number_of(argument)

        for index, step in enumerate(self.steps):
            args, kwargs = replace_leaves((step.args, step.kwargs), (Ref, Size), real)
            try:
                result = run_node(step.value.node, args, kwargs)
            except Exception as error:
                raise StepFailed(index, f"{step.value} raised {type(error).__name__}: {error}") from error
            if not accepts(step, result):
                raise StepFailed(index, f"{step.value} has shape {tuple(result.shape)}")
            results.append(result)
        return results[self.output.index]


def extract(members: Sequence[Value], inputs: Sequence[Value], output: Value) -> Fragment:
    """The program that computes ``output`` from ``inputs``.

    Assertions are left out: where the graph has fixed sizes they hold for no others.

    Args:
        members: the tensors to compute, in graph order. Sizes that they or the inputs determine are added.
        inputs: what the program is given.
        output: the member to return.

    Raises:
        ValueError: a member reads a tensor that is neither an input nor a member.
    """
    copied = sorted({*members, *_computed_sizes(members, inputs)} - {*inputs}, key=lambda v: v.position)
    builder = _Builder(inputs)
    steps = [builder.step(value) for value in copied if value.op not in _LEFT_OUT]
    return Fragment(inputs, steps, builder.result(output))


def _computed_sizes(members: Sequence[Value], inputs: Sequence[Value]) -> set[Value]:
    """The numbers that members read and that follow from ``members`` and ``inputs`` alone, and what they come from.

    A number that was known when the graph was captured follows from its own operands or is taken as it was; only of
    one that depends on data (a count of rows) all that it is computed from is looked at.
    """
    known = {*members, *inputs}
    found: set[Value] = set()
    stack = list(members)
    while stack:
        value = stack.pop()
        tensors_too = value in found and (value.is_tensor or _depends_on_data(value))
        fresh = {o for o in value.operands if o not in known and (tensors_too or not o.is_tensor)} - found
        found |= fresh
        stack.extend(fresh)
    for value in sorted(found, key=lambda v: v.position):
        tensors = [o for o in value.operands if o.is_tensor]
        if all(o in known for o in tensors) and any(o in known for o in value.operands):
            known.add(value)
    return found & known


def _depends_on_data(number: Value) -> bool:
    """Dynamo records nothing at all for the elements that ``tolist`` reads."""
    return number.example is None or not known_size(number.example)


class _Builder:
    def __init__(self, inputs: Sequence[Value]) -> None:
        self.inputs = {value: Ref(i) for i, value in enumerate(inputs)}
        self.of_node: dict[fx.Node, Ref] = {}
        self.size = len(inputs)

    def step(self, value: Value) -> Step:
        node = value.node

        def substitute(operand: fx.Node) -> Any:
            return self._operand(value, operand)

        args, kwargs = replace_leaves((list(node.args), dict(node.kwargs)), fx.Node, substitute)
        shape = known_shape(node)
        step = Step(value, *mark_sizes(call_name(node), args, kwargs, f"-> {shape}"), shape)
        self.of_node[node] = Ref(self.size)
        self.size += 1
        return step

    def result(self, output: Value) -> Ref:
        """Where the output is: in the tensor that it was written to, which may be an input."""
        if output.holder in self.of_node:
            return self.of_node[output.holder]
        written = next((ref for value, ref in self.inputs.items() if value.holder is output.holder), None)
        return written or self.of_node[output.node]

    def _operand(self, value: Value, node: fx.Node) -> Any:
        meaning = value.reads[node]
        if meaning in self.inputs:
            return self.inputs[meaning]
        if node in self.of_node:
            return self.of_node[node]
        if meaning.is_tensor:
            raise ValueError(f"{value} reads {meaning}, which is neither an input nor a part of the block")
        return symbol(meaning, "tokens")


def symbol(value: Value, prefers: str) -> Any:
    """What stands for a number that Dynamo keeps symbolic: a `Size`, or the number itself if it is no integer.

    Raises:
        ValueError: the number is not known before the graph runs.
    """
    number = hint(value.example) if known_size(value.example) else None
    if number is None:
        raise ValueError(f"the number {value} is not known before the graph runs")
    positive = isinstance(number, int) and not isinstance(number, bool) and number > 0
    return Size(number, "symbol", prefers, symbolic=True) if positive else number


def known_size(size: Any) -> bool:
    """Whether a size is a number, or a symbol with a number behind it."""
    return not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) or bool(size.node.has_hint())


def known_shape(node: fx.Node) -> tuple[int | None, ...] | None:
    """The shape that a node's tensor had when the graph was captured, None where that is unknown."""
    example = node.meta.get("example_value")
    if not isinstance(example, Tensor):
        return None
    return tuple(hint(size) if known_size(size) else None for size in example.shape)
